"""Bytes of a file to text, with nothing guessed and nothing lost; and what a reader tells the user besides the records."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

from lorakit.errors import DataError

UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# characters of a line, and of a field of a table; a quote that is never closed would take in the whole file
LONGEST = 2**24
MAGIC = {
    b"\x1f\x8b": "gzip data, whose name ends in .gz",
    b"PK\3\4": "a zip archive or an Excel workbook (.zip, .xlsx)",
    b"PAR1": "Parquet, whose name ends in .parquet",
    b"\x28\xb5\x2f\xfd": "Zstandard data, whose name ends in .zst",
}
MOST_UNPACKED = 50, 2**21  # times the file's size, and bytes; what passes both is a trap
MOST_EMPTY = 100_000  # lines that a file may begin with
DAMAGE = (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, RuntimeError)  # of compressed files


def inner_name(path: Path) -> Path:
    """The name that says what is in a file: without the ending of a compression, or of the one file in a zip archive."""
    if path.suffix.lower() == ".zip" and path.is_file():
        return Path(_member(path).filename)
    return path.with_suffix("") if path.suffix.lower() in COMPRESSED else path


def check_unpacked(path: Path) -> None:
    """Raise a DataError where what is in a zip archive is so much that it is a trap."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > max(MOST_UNPACKED[0] * path.stat().st_size, MOST_UNPACKED[1]):
            raise DataError(f"{path}: unpacks to more than {MOST_UNPACKED[0]} times its size")


def _zip(path: Path) -> Any:
    return zipfile.ZipFile(path).open(_member(path))


def _zstd(path: Path) -> Any:
    try:
        import zstandard
    except ImportError as err:
        raise DataError(f"{path}: unpacking it needs a package: pip install zstandard") from err
    return zstandard.open(path, "rb")


COMPRESSED: Mapping[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zip": _zip,
    ".zst": _zstd,
}


def _member(path: Path) -> zipfile.ZipInfo:
    """The one file in a zip archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.infolist() if not m.is_dir() and not m.filename.startswith("__MACOSX/")]
    except DAMAGE as err:
        raise DataError(f"{path}: damaged: {err}") from err
    if len(members) != 1:
        names = listed(member.filename for member in members)
        raise DataError(f"{path}: {len(members)} files in the archive: {names}; unpack it and give the one to read")
    return members[0]


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A file to read from its beginning within a block, unpacked where its name ends as that of a compressed one.

    Raises:
        DataError: it is missing, or is a folder, a pipe or a device, or what unpacks it is missing; or reading fails.
    """
    try:
        if path.exists() and not path.is_file():
            what = "a folder" if path.is_dir() else "a pipe or a device; write its content to a file first"
            raise DataError(f"{path}: not a regular file but {what}")
        with COMPRESSED.get(path.suffix.lower(), partial(Path.open, mode="rb"))(path) as file:
            yield file
    except OSError as err:
        raise DataError(f"{path}: cannot be read: {err.strerror or err}") from err
    except DAMAGE as err:
        raise DataError(f"{path}: damaged: {err}") from err


def read_bytes(path: Path) -> bytes:
    """The file's bytes, or a DataError that says why there are none."""
    with opened(path) as file:
        data = file.read()
    if not data.strip():
        raise DataError(f"{path}: the file is empty")
    return data


def read_text(path: Path, encoding: str | None = None) -> str:
    """The text of a whole file with its line ends as they are; errors as `stream_lines`."""
    return "".join(stream_lines(path, encoding, longest=-1))


def lines_of(path: Path, encoding: str | None = None) -> list[str]:
    """The lines of a file without their ends; errors as `stream_lines`."""
    return [line.rstrip("\r\n") for line in stream_lines(path, encoding)]


def stream_lines(path: Path, encoding: str | None = None, *, longest: int = LONGEST) -> Iterator[str]:
    """The lines of a file, each with its end, one in memory at a time: the one way in which all readers cut a file.

    Lines end at \\n, \\r\\n or \\r; other line separators may stand inside a text. A byte-order mark is dropped.

    Raises:
        DataError: the file cannot be read or is empty, a byte is not of the encoding (UTF-8 where none is named), there
            is a NUL character, or a line is longer than `longest` characters.
    """
    codec = _codec(path, encoding)
    empty = True
    if path.suffix.lower() in COMPRESSED and path.is_file():
        _check_stream(path, path.stat().st_size, path.stat().st_mtime_ns)
    try:
        with opened(path) as raw, io.TextIOWrapper(raw, codec, newline="") as text:
            head = raw.read(4)
            if encoding is None and head[:2] in UTF16:
                raise DataError(f"{path}:1: the file is UTF-16; set data.encoding=utf-16")
            if what := next((what for magic, what in MAGIC.items() if head.startswith(magic)), None):
                raise DataError(f"{path}: not text but {what}")
            if b"\0" in head and encoding is None:
                raise _nul(path, 1, encoding)
            raw.seek(0)
            for number, line in enumerate(iter(partial(text.readline, longest), ""), start=1):
                if "\0" in line:
                    raise _nul(path, number, encoding)
                if len(line) == longest and line[-1] not in "\r\n":
                    raise DataError(f"{path}:{number}: the line has more than {longest:,} characters")
                if empty:
                    empty = not line.strip()
                    if number > MOST_EMPTY:
                        raise DataError(f"{path}: the first {MOST_EMPTY:,} lines are empty")
                yield line
    except UnicodeDecodeError as err:
        raise _undecodable(path, codec, err) from err
    if empty:
        raise DataError(f"{path}: the file is empty")


@lru_cache(64)  # of a file as it is: it is opened several times
def _check_stream(path: Path, size: int, changed: int) -> None:
    """Raise a DataError where a compressed file unpacks to so much that it is a trap."""
    left = max(MOST_UNPACKED[0] * size, MOST_UNPACKED[1])
    with opened(path) as raw:
        while block := raw.read(2**20):
            if (left := left - len(block)) < 0:
                raise DataError(f"{path}: unpacks to more than {MOST_UNPACKED[0]} times its size; unpack it first")


def _nul(path: Path, line: int, encoding: str | None) -> DataError:
    hint = "" if encoding else "; if the file is UTF-16, set data.encoding=utf-16-le or utf-16-be"
    return DataError(f"{path}:{line}: a NUL character, which text cannot have{hint}")


def _codec(path: Path, encoding: str | None) -> str:
    try:
        name = codecs.lookup(encoding or "utf-8").name
        io.TextIOWrapper(io.BytesIO(), name)  # some codecs are from bytes to bytes
    except (LookupError, ValueError) as err:
        raise DataError(
            f"{path}: data.encoding = {encoding!r} is not a known encoding; common ones: utf-8, cp1252"
        ) from err
    return "utf-8-sig" if name == "utf-8" else name


def encoding_note(path: Path, encoding: str | None) -> list[str]:
    """What is to be said of a text file that is read by another encoding than UTF-8."""
    if encoding is None or _codec(path, encoding) == "utf-8-sig":
        return []
    return [f"{path}: read as {encoding}" + (", but it is also valid UTF-8; check the texts" if is_utf8(path) else "")]


def is_utf8(path: Path) -> bool:
    """Whether a file has more than ASCII, and all of it is valid UTF-8."""
    decoder, is_ascii = codecs.getincrementaldecoder("utf-8")(), True
    try:
        with opened(path) as raw:
            while block := raw.read(2**20):
                is_ascii = is_ascii and block.isascii()
                decoder.decode(block)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return not is_ascii


def _undecodable(path: Path, codec: str, err: UnicodeDecodeError) -> DataError:
    """What the decoder met, with its place in the file; the error itself has that in its block."""
    decoder, position, line = codecs.getincrementaldecoder(codec)(), 0, 1
    with opened(path) as raw:
        for block in raw:
            try:
                decoder.decode(block)
            except UnicodeDecodeError as inner:
                # from the block's beginning, before which lies what was incomplete
                start = inner.start - (len(inner.object) - len(block))
                line += inner.object[: inner.start].replace(b"\r\n", b"\n").replace(b"\r", b"\n").count(b"\n")
                position += start
                byte = inner.object[inner.start]
                break
            position += len(block)
            line += block.replace(b"\r\n", b"\n").replace(b"\r", b"\n").count(b"\n")
        else:
            return DataError(f"{path}:{line}: the file ends inside a character ({err.reason})")
    if codec != "utf-8-sig":
        return DataError(f"{path}:{line}: byte {position} (0x{byte:02x}) is not valid {codec}; see data.encoding")
    return DataError(
        f"{path}:{line}: byte {position} (0x{byte:02x}) is not valid UTF-8; set the file's encoding, for example "
        f"data.encoding=cp1252 (Western Europe, Windows){_guessed(path)}"
    )


def _guessed(path: Path) -> str:
    """What the beginning of a file looks like, for a message: a guess, which is not acted on."""
    from charset_normalizer import from_bytes  # late: most files are UTF-8

    with opened(path) as raw:
        guesses = from_bytes(raw.read(2**16))
    if (best := guesses.best()) is None:
        return ""
    as_likely = {  # of a few lines several code pages are equally likely, and the common one is named already
        name
        for guess in guesses
        if guess.chaos <= best.chaos and guess.coherence >= best.coherence
        for name in (guess.encoding, *guess.could_be_from_charset)
    }
    return "" if as_likely & {"cp1252", "utf_8", "ascii"} else f"; it looks like {best.encoding}"


MOST = 5  # places that a note lists
MOST_BAD = 10  # records that an error lists
MOST_NAMES = 12  # that a message lists
MOST_SHOWN = 80  # characters of a name in a message


def listed(names: Iterable[str]) -> str:
    """Names for a message: the first ones, and how many there are."""
    every = [name or "''" for name in names]  # the column of row numbers often has no name
    shown = ", ".join(n if len(n) <= MOST_SHOWN else n[: MOST_SHOWN - 3] + "..." for n in every[:MOST_NAMES])
    return shown if len(every) <= MOST_NAMES else f"{shown}, ... ({len(every):,} in all)"


def counted(what: str, places: Sequence[str]) -> list[str]:
    """The note `what: how many (the first places)`, or none where there is no place."""
    if not places:
        return []
    more = ", ..." if len(places) > MOST else ""
    return [f"{what}: {len(places)} ({', '.join(places[:MOST])}{more})"]


def bad_records(source: str, bad: Sequence[DataError], n: int | None = None, *, of_all: bool = False) -> DataError:
    """The one error of `n` records that cannot be used, of which these are the first: ten with their places."""
    n = n or len(bad)
    if n == 1:
        return bad[0]
    what = "none of its records can be used" if of_all else f"{n:,} records cannot be used"
    what += "; correct them" + ("" if of_all else ", or leave them out with data.on_bad=skip")
    reasons = [*_reasons(bad[:MOST_BAD]), *[f"and {n - MOST_BAD:,} more"] * (n > MOST_BAD)]
    return DataError(f"{source}: {what}: {'; '.join(reasons)}")


def _reasons(bad: Iterable[DataError]) -> list[str]:
    """What is wrong with each record, once where it is the same of several: `a.csv:5, 13: column 'label' is empty`."""
    lines: dict[tuple[str, str], list[str]] = {}
    for err in bad:
        match = re.fullmatch(r"(.+?):(\d+)(: .*)", str(err), re.DOTALL)
        file, line, what = match.groups() if match else (str(err), "", "")
        lines.setdefault((file, what), []).append(line)
    return [f"{file}:{', '.join(numbers)}{what}" if what else file for (file, what), numbers in lines.items()]


def left_out(source: str, bad: Sequence[DataError], n: int | None = None) -> list[str]:
    """The note of `n` records that were left out, with the first reasons; none where there is none."""
    n = n or len(bad)
    reasons = [*_reasons(bad[:MOST]), *["..."] * (n > MOST)]
    return [f"{source}: bad records left out: {n:,} ({'; '.join(reasons)})"] if n else []


def in_order(bad: Iterable[DataError]) -> list[DataError]:
    """What is wrong with records, in the order of their lines; some of it is found after all of a file has been read."""

    def place(err: DataError) -> tuple[str, int]:
        match = re.match(r"(.+?):(\d+)", str(err))
        return (match[1], int(match[2])) if match else ("", 0)

    return sorted(bad, key=place)
