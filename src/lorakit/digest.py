"""Fingerprints of files and folders."""

from __future__ import annotations

import hashlib
from pathlib import Path


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def folder_sha256(folder: Path) -> str:
    """sha256 over the names and the bytes of the files of a folder and those below it, in hexadecimal."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = (f"{path.relative_to(folder).as_posix()} {file_sha256(path)}\n" for path in files)
    return hashlib.sha256("".join(sums).encode()).hexdigest()
