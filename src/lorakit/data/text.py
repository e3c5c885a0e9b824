"""Bytes of a file to text, with nothing guessed and nothing lost; and what a reader tells the user besides the records."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from pathlib import Path

from lorakit.errors import DataError

UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_bytes(path: Path) -> bytes:
    """The file's bytes, or a DataError that says why there are none."""
    try:
        data = path.read_bytes()
    except OSError as err:
        raise DataError(f"{path}: cannot be read: {err.strerror}") from err
    if not data.strip():
        raise DataError(f"{path}: the file is empty")
    return data


def decode(path: Path, data: bytes) -> str:
    """The text of a UTF-8 file, a byte-order mark dropped; other encodings and NUL are errors with their line."""
    text = _decode(path, data)
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    return text


def stream_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, each up to its \\n and with it, one in memory at a time; errors as `decode`."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield _decode(path, line, number)
    except OSError as err:
        raise DataError(f"{path}: cannot be read: {err.strerror}") from err


def _decode(path: Path, data: bytes, first: int = 1) -> str:
    """The text of the lines from number `first` on."""
    if data.startswith(UTF16):
        raise DataError(f"{path}:{first}: the file is UTF-16; save it as UTF-8")
    if b"\0" in data:
        line = data.count(b"\n", 0, data.index(b"\0")) + first
        raise DataError(f"{path}:{line}: a NUL character; text has none; if the file is UTF-16, save it as UTF-8")
    try:
        return data.decode("utf-8-sig" if first == 1 else "utf-8")
    except UnicodeDecodeError as err:
        line = data.count(b"\n", 0, err.start) + first
        raise DataError(
            f"{path}:{line}: byte {err.start} (0x{data[err.start]:02x}) is no UTF-8; "
            "if the file is Latin-1 or Windows-1252, save it as UTF-8"
        ) from err


def lines_of(path: Path) -> list[str]:
    """The lines of a file, which end at \\n, \\r\\n or \\r; other line separators may stand inside a text."""
    text = decode(path, read_bytes(path)).replace("\r\n", "\n").replace("\r", "\n")
    return text.removesuffix("\n").split("\n")


MOST = 5  # places that a note lists


def counted(what: str, places: Sequence[str]) -> list[str]:
    """The note `what: how many (the first places)`, or none where there is no place."""
    if not places:
        return []
    more = ", ..." if len(places) > MOST else ""
    return [f"{what}: {len(places)} ({', '.join(places[:MOST])}{more})"]
