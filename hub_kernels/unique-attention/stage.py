"""Stage the kernel for the Hub: `build/torch-<backend>/` with metadata, for `get_local_kernel` and `upload_folder`.

Usage: python hub_kernels/unique-attention/stage.py --out dist/kernel
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).resolve().parent


def stage(out: Path) -> list[Path]:
    """Write `<out>/build/torch-<backend>/` for every backend of build.toml, and the card and benchmarks beside it.

    Args:
        out (`Path`): Folder to fill; an earlier `build` or `benchmarks` in it is replaced.

    Returns:
        `list[Path]`: The variant folders.
    """
    general = tomllib.loads((HERE / "build.toml").read_text())["general"]
    package = HERE / "torch-ext" / general["name"].replace("-", "_")
    for folder in ("build", "benchmarks"):
        shutil.rmtree(out / folder, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    shutil.copytree(HERE / "benchmarks", out / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(HERE / "CARD.md", out / "README.md")
    shutil.copy(HERE / "build.toml", out / "build.toml")
    variants = []
    for backend in general["backends"]:
        variant = out / "build" / f"torch-{backend}"
        shutil.copytree(package, variant, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        metadata = {
            "name": general["name"],
            # a module name of its own, so that two versions can live in one process
            "id": f"_{package.name}_{backend}_{_digest(package)}",
            "version": general["version"],
            "license": general["license"],
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        variants.append(variant)
    return variants


def _digest(package: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def main() -> None:
    """Parse the command line, stage, and say what was written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to fill, e.g. dist/kernel")
    for variant in stage(parser.parse_args().out):
        print(variant)


if __name__ == "__main__":
    main()
