"""The text that hides the facts of the demo, or the user's own; stdlib only."""

from __future__ import annotations

import zlib
from pathlib import Path


def topics(held_out: bool) -> str:
    """The held-out or the training half of `pydoc_data.topics`, English text that comes with every Python.

    Args:
        held_out (`bool`): `True` for about half of the topics (two thirds of the text), chosen by a hash of their
            names, which the pocket model never saw; `False` for the others.
    Returns:
        `str`: The topics, in the order of their names.
    """
    from pydoc_data.topics import topics as table

    names = sorted(name for name in table if (zlib.crc32(name.encode()) % 2 == 0) == held_out)
    return "\n\n".join(table[name].strip() for name in names) + "\n"


def read_text(path: str | Path) -> str:
    """A text file, refused clearly where it is none.

    Args:
        path (`str` or `Path`): UTF-8 text, with or without a byte order mark.
    Returns:
        `str`: Its text with `\\n` line ends.
    Raises:
        ValueError: The file is missing, a folder, unreadable, empty, or not text; the message says which.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"expected a text file, got {str(path)!r}, which does not exist: check the path")
    if not path.is_file():
        raise ValueError(f"expected a text file, got {str(path)!r}, which is not a file: name one file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"expected a readable text file, got {str(path)!r}: {error.strerror}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"expected UTF-8 text, got {str(path)!r}, whose byte {error.start} is not: a binary file, or text in "
            "another encoding; convert it, e.g. with `iconv -t UTF-8`"
        ) from error
    if "\0" in text:
        raise ValueError(
            f"expected text, got {str(path)!r} with zero bytes in it: a binary file; extract its text first"
        )
    if not text.strip():
        raise ValueError(f"expected some text, got {str(path)!r}, which is empty: name a file with text in it")
    return text.replace("\r\n", "\n")
