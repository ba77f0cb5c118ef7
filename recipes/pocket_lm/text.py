"""Training text that every machine with Python already has, in a fixed order.

Sources: `pydoc_data.topics`, the docstrings of the standard library and of installed packages, package descriptions
(METADATA), files of /usr/share/doc and some Python source. About half of the topics of `pydoc_data.topics`, chosen by
a hash of the name (two thirds of its text), are held out: they are the text of the demo and of every evaluation.
"""

import gzip
import importlib.util
import re
import sysconfig
import zlib
from pathlib import Path

from unique_hf.text import topics

_DOCSTRING = re.compile(r'"""(.*?)"""', re.DOTALL)
_MAX_FILE = 1 << 20


def _read(path):
    try:
        data = path.read_bytes() if path.stat().st_size <= _MAX_FILE else b""
        if path.suffix == ".gz":
            data = gzip.decompress(data)[:_MAX_FILE] if data else b""
        return data.decode("utf-8")
    except (OSError, UnicodeDecodeError, EOFError, zlib.error):
        return ""  # unreadable or not text: not worth stopping for, the text is whatever the machine has


def _dedent(block):
    lines = block.expandtabs(4).split("\n")
    indents = [len(line) - len(line.lstrip()) for line in lines[1:] if line.strip()]
    margin = min(indents, default=0)
    return "\n".join([lines[0].strip(), *(line[margin:].rstrip() for line in lines[1:])]).strip()


def _packages():
    return Path(importlib.util.find_spec("tokenizers").origin).parents[1]


def _python_sources():
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    held_out = Path(importlib.util.find_spec("pydoc_data.topics").origin).resolve()
    for path in sorted(stdlib.rglob("*.py")):
        if not {"site-packages", "dist-packages", "test"} & set(path.parts) and path.resolve() != held_out:
            yield path, True
    for path in sorted(_packages().rglob("*.py")):
        yield path, False


def _documents(doc_dir):
    yield topics(held_out=False)
    for path in sorted(_packages().glob("*.dist-info/METADATA")):
        yield _read(path).partition("\n\n")[2]
    for path, is_stdlib in _python_sources():
        source = _read(path)
        for block in _DOCSTRING.findall(source):
            yield _dedent(block)
        if is_stdlib and zlib.crc32(path.name.encode()) % 4 == 0:
            yield source
    for path in sorted(doc_dir.rglob("*")) if doc_dir.is_dir() else ():
        if path.is_file() and not path.is_symlink() and path.name != "copyright" and "changelog" not in path.name:
            yield _read(path)


def collect_text(max_bytes=64 << 20, doc_dir="/usr/share/doc"):
    """Documents of this machine, without duplicates, in a fixed order, until `max_bytes` are reached.

    Args:
        max_bytes (`int`, *optional*, defaults to 64 MiB): Stops after the document that reaches it.
    Returns:
        `list[str]`; never contains the held-out half of `pydoc_data.topics`.
    """
    held_out = {line for line in topics(held_out=True).split("\n") if len(line) > 40} - set(
        topics(held_out=False).split("\n")
    )
    found, seen, size = [], set(), 0
    for document in _documents(Path(doc_dir)):
        key = zlib.crc32(document.encode())
        if len(document) < 200 or key in seen or "\0" in document:
            continue
        lines = document.split("\n")
        # other copies of the language reference are the held-out text in disguise
        if sum(line in held_out for line in lines) > max(2, len(lines) // 50):
            continue
        seen.add(key)
        found.append(document)
        size += len(document)
        if size >= max_bytes:
            break
    return found
