"""Which kernel module runs: the bundled one, one from the Hub, or a staged folder. The only reader of env variables.

May import the standard library and, lazily, the kernel package and `kernels`.
"""

from __future__ import annotations

import functools
import importlib
import os
from pathlib import Path
from types import ModuleType

KERNEL_VARIABLE = "UNIQUE_HF_KERNEL"
KERNEL_VERSION = 1


@functools.cache
def load_kernel(source: str = "") -> ModuleType:
    """Load the kernel module from one of its three homes.

    Args:
        source (`str`, *optional*, defaults to `""`):
            `""` or `"bundled"`: the copy inside this package. A path (absolute, or starting with `.` or `~`): a folder
            staged by `make kernel`, or one build variant of it. `"<org>/<name>"` or `"<org>/<name>@<revision>"`: a Hub
            kernel; naming it is taken as trust in its publisher, since its Python code runs in this process.

    Returns:
        `ModuleType`: The module, with the public names of `unique_attention`.

    Raises:
        ValueError: `source` is none of the three.
        FileNotFoundError: The path does not exist.
        ImportError: A Hub id or path was given and the `kernels` package is missing.
    """
    if source in ("", "bundled"):
        return importlib.import_module("unique_attention")
    if os.path.isabs(source) or source.startswith((".", "~")):
        path = Path(source).expanduser().resolve()
        if not path.is_dir():
            raise FileNotFoundError(f"expected a folder staged by `make kernel`, got {source!r}, which does not exist")
        return _kernels_package().get_local_kernel(path)
    name, _, revision = source.partition("@")
    if name.count("/") != 1 or not all(name.split("/")) or source.endswith("@"):
        raise ValueError(
            f"expected 'bundled', a path starting with '/', '.' or '~', or '<org>/<name>[@<revision>]', got "
            f"{source!r}: change the environment variable {KERNEL_VARIABLE}"
        )
    where = {"revision": revision} if revision else {"version": KERNEL_VERSION}
    return _kernels_package().get_kernel(name, trust_remote_code=[name], **where)


def kernel_module() -> ModuleType:
    """The kernel module this process uses, chosen once by the environment variable `UNIQUE_HF_KERNEL`.

    Returns:
        `ModuleType`: See [`load_kernel`].
    """
    return load_kernel(_requested_source())


def adapter() -> ModuleType:
    """The part of the kernel module that speaks to Transformers; importing it registers "unique" there.

    Returns:
        `ModuleType`: Attention, mask and cache layers, with the counters of what ran.
    """
    return importlib.import_module(f"{kernel_module().__name__}.hf")


@functools.cache
def _requested_source() -> str:
    return os.environ.get(KERNEL_VARIABLE, "").strip()


def _kernels_package() -> ModuleType:
    try:
        return importlib.import_module("kernels")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{KERNEL_VARIABLE} asks for a kernel outside this package, which needs `kernels`: "
            "pip install 'unique-hf[hub]', or unset the variable"
        ) from error
