"""Weights that a model has as a pickle alone (`pytorch_model.bin`), converted once to safetensors; nothing in them is run.

A pickle is a program. Before torch reads one (with weights_only=True, whose own guards have had holes), every instruction
of it has to be one of those that a dict of tensors needs, and every name in it one of those that build tensors. Whatever
else it holds, it is refused as a whole.
"""

from __future__ import annotations

import hashlib
import json
import pickletools
import shutil
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lorakit.errors import ModelError, first_line
from lorakit.hashing import file_sha256, open_regular

PICKLES = "pytorch_model*.bin"
BESIDE = (
    "*.json",
    "*.txt",
    "*.model",
    "*.spm",
    "*.bpe",
    "*.codes",
    "*.tokenizer",
)  # of a model's files, all but weights
RECORD = "converted.json"
MOST_PICKLE = 2**26  # bytes; the instructions for 1,000 tensors take 100 kB
LEGACY_PICKLES = 5  # in files from before torch 1.6, followed by the bytes of the tensors
DTYPES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
NAMES = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {dtype}Storage" for dtype in DTYPES),
}
INSTRUCTIONS = {
    *(
        "PROTO",
        "STOP",
        "MARK",
        "GLOBAL",
        "REDUCE",
        "BUILD",
        "BINPERSID",
        "BINPUT",
        "LONG_BINPUT",
        "BINGET",
        "LONG_BINGET",
    ),
    *(
        "NONE",
        "NEWTRUE",
        "NEWFALSE",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG1",
        "BINFLOAT",
        "BINUNICODE",
        "SHORT_BINSTRING",
    ),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS"),
    *("EMPTY_DICT", "SETITEM", "SETITEMS"),
}


def converted(folder: Path, cache: Path) -> Path:
    """The model folder with its pickled weights as safetensors: one in `cache`, named by the sha256 of all that it is made of.

    Raises:
        ModelError: a pickle holds anything but tensors by name, or a file cannot be read or written; none of it was run.
    """
    pickles = sorted(folder.glob(PICKLES))
    beside = [path for pattern in BESIDE for path in (*folder.glob(pattern), *folder.glob(f"1_Pooling/{pattern}"))]
    try:
        sums = {path: file_sha256(path) for path in (*pickles, *sorted(beside))}
        lines = (f"{path.relative_to(folder).as_posix()} {sha256}\n" for path, sha256 in sums.items())
        place = cache / hashlib.sha256("".join(lines).encode()).hexdigest()[:32]
        if place.is_dir():
            return place
        tensors = {name: tensor for path in pickles for name, tensor in _tensors_in(path).items()}
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            made = Path(scratch) / "model"
            made.mkdir()
            for path in beside:
                if not path.name.endswith(".index.json"):  # which would name the shards of the pickle
                    copy = made / path.relative_to(folder)
                    copy.parent.mkdir(exist_ok=True)
                    shutil.copyfile(path, copy)
            save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
            record = {"from": {path.name: sums[path] for path in pickles}}
            (made / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            if not place.is_dir():  # another process may have been faster
                made.rename(place)
    except OSError as err:
        raise ModelError(
            f"{err.filename or folder}: cannot be converted to safetensors: {err.strerror or err}"
        ) from err
    return place


def conversion_note(folder: Path, name: str) -> str | None:
    """What a user is told of a model that was converted, None of any other."""
    if not (folder / RECORD).is_file():
        return None
    sums = json.loads((folder / RECORD).read_text(encoding="utf-8"))["from"]
    made_of = ", ".join(f"{file}, sha256 {sha256[:12]}..." for file, sha256 in sums.items())
    return f"{name}: its weights are a pickle ({made_of}); it was scanned, not run, and is read as safetensors from {folder}"


def _tensors_in(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled checkpoint by name, each with its own memory."""
    with open_regular(path) as file:
        try:
            _scan(file, path)
            file.seek(0)
            loaded: Any = torch.load(file, map_location="cpu", weights_only=True)
        except ModelError:
            raise
        except Exception as err:  # a damaged file fails wherever it is first used, with whatever is raised there
            raise ModelError(f"{path}: damaged: {first_line(err)}") from err
        size = file.seek(0, 2)
    if type(loaded) not in (dict, OrderedDict) or not loaded:
        raise ModelError(f"{path}: holds {_kind(loaded)}, not tensors by name; {REFUSED}")
    tensors: Mapping[Any, Any] = dict(dict.items(loaded))  # not its own `items`, which a pickle may have set
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            what = name[:80] if isinstance(name, str) else _kind(name)
            raise ModelError(f"{path}: {what!r} is {_kind(tensor)}, not a tensor by name; {REFUSED}")
        if tensor.numel() * tensor.element_size() > size:  # strides of 0 make 10^12 numbers of one
            raise ModelError(f"{path}: {name[:80]!r} has {tensor.numel():,} numbers in a file of {size:,} bytes")
    return {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}


REFUSED = "nothing of it was read"


def _scan(file: IO[bytes], path: Path) -> None:
    """Refuse a file of torch.save whose pickle holds anything that a dict of tensors does not need."""
    is_archive = file.read(4) == b"PK\x03\x04"  # as torch tells them apart, so that both read the same pickle
    file.seek(0)
    if not is_archive:
        for _ in range(LEGACY_PICKLES):
            _scan_pickle(file, path)
        return
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        top = names[0].partition("/")[0] if names else ""
        known = {
            f"{top}/{name}" for name in ("data.pkl", "version", "byteorder", ".format_version", ".storage_alignment")
        }
        for entry in entries:
            name = entry.filename
            if name not in known and not name.startswith((f"{top}/data/", f"{top}/.data/")):
                raise ModelError(f"{path}: holds {name[:80]!r}, which no file of tensors has; {REFUSED}")
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise ModelError(f"{path}: {name[:80]!r} is compressed, as torch writes no tensors; {REFUSED}")
        if len(set(names)) < len(names) or f"{top}/data.pkl" not in names:
            raise ModelError(f"{path}: damaged: not one data.pkl, or a name twice; {REFUSED}")
        if archive.getinfo(f"{top}/data.pkl").file_size > MOST_PICKLE:
            raise ModelError(f"{path}: its pickle has more than {MOST_PICKLE:,} bytes; {REFUSED}")
        with archive.open(f"{top}/data.pkl") as data:
            _scan_pickle(data, path)


def _scan_pickle(file: IO[bytes], path: Path) -> None:
    start = file.tell()
    for instruction, argument, position in pickletools.genops(file):
        if instruction.name == "GLOBAL" and argument not in NAMES:
            raise ModelError(
                f"{path}: its pickle names {str(argument)[:80].replace(' ', '.')!r}, which is no tensor; {REFUSED}"
            )
        if instruction.name not in INSTRUCTIONS:
            raise ModelError(
                f"{path}: its pickle has the instruction {instruction.name}, which tensors do not need; {REFUSED}"
            )
        if (position or 0) - start > MOST_PICKLE:
            raise ModelError(f"{path}: its pickle has more than {MOST_PICKLE:,} bytes; {REFUSED}")


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"
