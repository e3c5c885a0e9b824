"""Files that somebody else may have made: read within limits, and their fingerprints."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import stat
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

PARTS = {
    "weights": ("weights have", "the ones"),
    "config": ("config has", "the one"),
    "tokenizer": ("tokenizer has", "the one"),
}
KINDS = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
MOST_DIGITS = 4_000  # of a whole number in JSON; Python reads 4,300


def user_cache(name: str) -> Path | None:
    """A folder for what can be made again, in the user's cache; None for a user without a home. It need not exist."""
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not home.is_absolute():  # then it is to be ignored (XDG base directories)
        try:
            home = Path.home() / ".cache"
        except RuntimeError:
            return None
    return home / "lorakit" / name if home.is_absolute() else None


class Fingerprint(NamedTuple):
    """What tells a base model from any that answers otherwise: a sha256 of each part; None where it is not known."""

    weights: str
    config: str | None = None  # but for names in it
    tokenizer: str | None = None  # what decides which ids a text has

    def differences(self, other: Fingerprint) -> list[str]:
        """A phrase for each part that is known of both and differs."""
        pairs = (
            (part, was, now) for part, was, now in zip(PARTS, self, other, strict=True) if was and now and was != now
        )
        return [
            f"its {PARTS[part][0]} sha256 {was[:12]}..., {PARTS[part][1]} found {now[:12]}..."
            for part, was, now in pairs
        ]


def open_regular(path: Path, most: int | None = None) -> io.BufferedReader:
    """A file to read, of `most` bytes.

    Raises:
        OSError: it is missing, larger, or a folder, a pipe or a device, which may block or never end.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if most is not None and status.st_size > most:
            raise OSError(errno.EFBIG, f"has {status.st_size:,} bytes; at most {most:,} are read", str(path))
        return os.fdopen(descriptor, "rb")
    except OSError:
        os.close(descriptor)
        raise


def read_object(path: Path, most: int) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        OSError: as `open_regular`.
        ValueError: it is not valid UTF-8, not JSON or not an object, or a key appears twice in it.
    """
    with open_regular(path, most) as stream:
        data = stream.read()
    try:
        raw = json.loads(data.decode(), object_pairs_hook=unique_keys, parse_int=_int)
    except UnicodeDecodeError as err:
        raise ValueError(f"not valid UTF-8 at byte {err.start:,}") from err
    except json.JSONDecodeError as err:
        raise ValueError(f"not JSON: {err}") from err
    except RecursionError as err:
        raise ValueError("nested too deep") from err
    if not isinstance(raw, dict):
        raise ValueError(f"holds {KINDS[type(raw)]}, not an object")
    if b"\\u" in data:  # which may write half of a pair, a text that nothing can print
        for key, value in raw.items():
            try:
                json.dumps({key: value}, ensure_ascii=False).encode()
            except UnicodeEncodeError as err:
                raise ValueError(f"{key!r} holds half of a surrogate pair, which is not valid Unicode") from err
    return raw


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, whose keys stand once each. Raises a ValueError."""
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice[:80]!r} appears twice in an object")
    return values


def _int(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def parse_toml(text: str) -> dict[str, Any]:
    """What a TOML text says. Raises a ValueError (a TOMLDecodeError where it is not TOML) in one line."""
    try:
        return tomllib.loads(text)
    except RecursionError as err:
        raise ValueError("nested too deep") from err
    except ValueError as err:
        if isinstance(err, tomllib.TOMLDecodeError):
            raise
        match = re.search(rf"\d[\d_]{{{MOST_DIGITS},}}", text)  # Python's own words are about a setting of Python's
        line = text[: match.start() if match else 0].count("\n") + 1
        raise ValueError(f"line {line}: a number of too many digits") from err


def file_sha256(path: Path, most: int | None = None) -> str:
    """sha256 of a file's bytes, in hexadecimal; errors as `open_regular`."""
    with open_regular(path, most) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def folder_sha256(folder: Path) -> str:
    """sha256 over the names and the bytes of the files of a folder and those below it, in hexadecimal."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = (f"{path.relative_to(folder).as_posix()} {file_sha256(path)}\n" for path in files)
    return hashlib.sha256("".join(sums).encode()).hexdigest()
