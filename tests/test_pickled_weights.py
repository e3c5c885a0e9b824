"""Weights as a pickle: read as torch and transformers read them, converted once; a pickle that holds more is refused unrun."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from lorakit.errors import ModelError
from lorakit.hashing import fingerprint_of
from lorakit.model_files import MOST_PICKLE, converted, find
from lorakit.models import load_base
from lorakit.training.prepare import prepare
from tests.runs import changed, sections

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
LEGACY = {"_use_new_zipfile_serialization": False}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def pickled(bert: Path, tmp_path: Path) -> Path:
    """The tiny BERT with its weights as a pickle alone."""
    folder = shutil.copytree(bert, tmp_path / "pickled")
    weights = folder / "model.safetensors"
    torch.save(OrderedDict(load_file(weights)), folder / "pytorch_model.bin")
    weights.unlink()
    return folder


@pytest.mark.usefixtures("home", "base_read_anew")
@pytest.mark.parametrize("form", ["zip", "legacy", "old names", "two shards", "a module's own state"])
def test_pickled_weights_are_the_model_that_transformers_loads(pickled: Path, form: str) -> None:
    file = pickled / "pytorch_model.bin"
    state = torch.load(file, weights_only=True)
    if form == "old names":  # of LayerNorm's, as in BERT's first checkpoints
        names = {".weight": ".gamma", ".bias": ".beta"}
        state = {
            key.replace(end, names[end]) if "LayerNorm" in key else key: value
            for key, value in state.items()
            for end in names
            if key.endswith(end)
        } | {key: value for key, value in state.items() if not key.endswith((".weight", ".bias"))}
    if form == "two shards":
        names = list(state)
        shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
        for shard, own in shards.items():
            torch.save({name: state[name] for name in own}, pickled / shard)
        index = {"metadata": {}, "weight_map": {name: shard for shard, own in shards.items() for name in own}}
        (pickled / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        file.unlink()
    elif form == "a module's own state":  # an OrderedDict with an attribute, parameters that share memory
        model = transformers.AutoModel.from_pretrained(pickled, use_safetensors=False, add_pooling_layer=False)
        file.unlink()  # which the model has mapped into memory
        torch.save(
            {**model.state_dict(), "twice": torch.nn.Parameter(model.get_input_embeddings().weight.detach())}, file
        )
    else:
        torch.save(state, file, **(LEGACY if form == "legacy" else {}))
    options = {"add_pooling_layer": False, "use_safetensors": False}
    expected = transformers.AutoModel.from_pretrained(pickled, **options).state_dict()
    actual: Any = load_base(str(pickled), "sequence_classification", labels=("x", "y"), pooling="mean").model
    assert all(torch.equal(actual.state_dict()[key], value) for key, value in expected.items())


def test_conversion_is_done_once_and_has_one_fingerprint(
    pickled: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again = converted(pickled, home / "a"), converted(pickled, home / "b")
    assert fingerprint_of(first) == fingerprint_of(again)
    made = find(str(pickled))
    assert made.parent == home / "lorakit"
    assert [path.name for path in made.parent.iterdir()] == [made.name], "nothing half made is left"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", None)  # it is never read again
        assert find(str(pickled)) == made
    (pickled / "tokenizer_config.json").write_text("{}")  # and what lies beside it is not that of an older folder
    assert converted(pickled, home / "lorakit") != made


@pytest.mark.usefixtures("home", "base_read_anew")
def test_run_over_pickled_weights_says_so(pickled: Path, files: Path) -> None:
    said: list[str] = []
    recipe = changed(sections(pickled, files), "train.max_steps=1")
    prepare(recipe, lambda event: said.append(str(getattr(event, "text", ""))))
    (line,) = (line for line in said if "pickle" in line)
    assert "(pytorch_model.bin, sha256 " in line
    assert "was scanned, not run" in line


# Hostile files


def archive(data: bytes, more: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED) -> bytes:
    """A file as torch.save writes it, of this pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as out:
        names = {"x/data.pkl": data, "x/data/0": torch.ones(6).numpy().tobytes(), "x/version": b"3\n"} | (more or {})
        for name, content in names.items():
            out.writestr(name, content)
    return file.getvalue()


def saved(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def call(module: str, name: str, *arguments: str) -> bytes:
    """A pickle of a dict, one value of which is what a call gives."""
    text = b"".join(b"X" + len(a).to_bytes(4, "little") + a.encode() for a in arguments)
    return b"\x80\x02}X\x01\x00\x00\x00a" + f"c{module}\n{name}\n".encode() + b"(" + text + b"tRs."


class Runs:
    """What runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


REBUILD = b"torch._utils\n_rebuild_tensor_v2\n"


def tensor(stride: str, numbers: int, size: str) -> bytes:
    """A pickle of one tensor of a storage of so many numbers, by these sizes and strides, as text of instructions."""
    n = b"\x8a\x06" + numbers.to_bytes(6, "little")
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + n + b"tQ"
    shape = b"(" + size.encode("latin1") + b"t(" + stride.encode("latin1") + b"t"
    rest = b"K\x00" + shape + b"\x89ccollections\nOrderedDict\n)R"
    return b"\x80\x02}X\x01\x00\x00\x00ac" + REBUILD + b"(" + storage + rest + b"tRs."


HUGE = "\x8a\x06\x00\x00\x00\x00\x00\x01"  # 2**40
LEGACY_FILE = saved(TENSORS, **LEGACY)
CALLS = {
    "os.system": ("os", "system", "touch ran"),
    "posix.system": ("posix", "system", "touch ran"),
    "eval": ("builtins", "eval", "open('ran', 'w')"),
    "exec": ("builtins", "exec", "open('ran', 'w')"),
    "exec of Python 2": ("__builtin__", "eval", "open('ran', 'w')"),
    "getattr": ("builtins", "getattr", "a", "upper"),
    "open": ("builtins", "open", "ran", "w"),
    "import": ("importlib", "import_module", "antigravity"),
    "subprocess": ("subprocess", "check_call", "touch ran"),
    "runpy": ("runpy", "run_path", "ran.py"),
    "pickle in a pickle": ("pickle", "loads", "."),
    "torch.load": ("torch.serialization", "load", "ran"),
    "torch.hub": ("torch.hub", "load", "nobody/nothing", "model"),
    "torch.jit": ("torch.jit", "load", "ran"),
    "bytes as storage": ("torch.storage", "_load_from_bytes", "."),
    "numpy": ("numpy.core.multiarray", "_reconstruct", "a"),
    "codecs": ("_codecs", "encode", "a", "latin1"),
    "dotted name": ("torch", "_utils.os.system", "touch ran"),
    "name of a name": ("torch._utils", "_rebuild_tensor_v2.__globals__", "a"),
    "another torch function": ("torch._utils", "_rebuild_device_tensor_from_numpy", "a"),
    "a trusted name with a space": ("collections OrderedDict", "", "a"),
}
HOSTILE: dict[str, bytes | Callable[[Path], None]] = {
    **{name: archive(call(*words)) for name, words in CALLS.items()},
    "call in protocol 4": archive(pickle.dumps({"a": Runs()}, protocol=4)),
    "call in protocol 0": archive(pickle.dumps({"a": Runs()}, protocol=0)),
    "plain pickle": pickle.dumps({"a": Runs()}, protocol=2),
    "instance by INST": archive(b"\x80\x02}X\x01\x00\x00\x00a(S'touch ran'\nios\nsystem\ns."),
    "instance by OBJ": archive(b"\x80\x02}X\x01\x00\x00\x00a(ccollections\nOrderedDict\nos."),
    "instance by NEWOBJ": archive(b"\x80\x02}X\x01\x00\x00\x00accollections\nOrderedDict\n)\x81s."),
    "extension registry": archive(b"\x80\x02}X\x01\x00\x00\x00a\x82\x01s."),
    "persistent id as text": archive(b"\x80\x02}X\x01\x00\x00\x00aP0\ns."),
    "persistent id of a module": archive(b"\x80\x02}X\x01\x00\x00\x00a(X\x06\x00\x00\x00moduletQs."),
    "memo that is not there": archive(b"\x80\x02}X\x01\x00\x00\x00ah\x07s."),
    "call in a legacy file": saved({**TENSORS, "c": Runs()}, **LEGACY),
    "call before a legacy file": pickle.dumps(Runs(), protocol=2) + LEGACY_FILE,
    "archive behind a legacy file": saved({"c": Runs()}, **LEGACY) + saved(TENSORS),
    "archive behind other bytes": b"\x80\x02." + saved(TENSORS),
    "program of TorchScript": archive(
        call("os", "system", "touch ran"), {"x/code/ran.py": b"", "x/constants.pkl": b"N."}
    ),
    "two pickles": archive(b"\x80\x02}.", {"y/data.pkl": call("os", "system", "touch ran")}),
    "way out of the folder": archive(b"\x80\x02}.", {"x/../../ran": b""}),
    "compressed": archive(tensor("K\x01", 6, "K\x06"), method=zipfile.ZIP_DEFLATED),
    "strides of nothing": archive(tensor("K\x00", 6, HUGE)),
    "numbers that are not there": archive(tensor("K\x01", 2**40, HUGE)),
    "numbers behind the end": archive(tensor("K\x01", 6, "K\x07")),
    "long pickle": archive(b"\x80\x02" + b"N0" * (MOST_PICKLE // 2) + b"}."),
    "string of 4 GB": archive(b"\x80\x02}X\xff\xff\xff\xffa"),
    "method of its own": archive(b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsc" + REBUILD + b"sb."),
    "no tensors": saved({}),
    "list": saved([torch.ones(1)]),
    "module": saved(torch.nn.Linear(2, 2)),
    "training checkpoint": saved({"model": TENSORS, "step": 3}),
    "numbers as names": saved({0: torch.ones(1)}),
    "numpy array": saved({"a": np.ones(2)}),
    "sparse tensor": saved({"a": torch.eye(2).to_sparse()}),
    "cut off": saved(TENSORS)[:-200],
    "legacy cut off": LEGACY_FILE[:-20],
    "nothing": b"",
    "other bytes": bytes(range(256)),
    "pipe": lambda path: os.mkfifo(path),
}
RAN = ("os.system", "os.posix_spawn", "subprocess.Popen", "socket.connect", "exec")


@pytest.fixture
def events() -> Iterator[list[str]]:
    """The audit events of the test's own time."""
    seen: list[str] = []
    watching = [True]
    sys.addaudithook(lambda event, args: seen.append(event) if watching[0] else None)
    yield seen
    watching[0] = False


def test_pickle_with_more_than_tensors_is_refused_unrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, events: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in {"good": saved(TENSORS), "bad": archive(call("os", "system"))}.items():
        with suppress(ModelError):
            converted(write(tmp_path / name, content), tmp_path / "cache")  # imports what is imported lazily
    shutil.rmtree(tmp_path / "cache")
    for name, content in HOSTILE.items():
        folder = write(tmp_path / name, content)
        events.clear()
        with pytest.raises(ModelError) as caught:
            converted(folder, tmp_path / "cache")
        message = str(caught.value)
        assert "\n" not in message, name
        assert message.startswith(str(folder / "pytorch_model.bin")), f"{name}: {message}"
        assert not [event for event in events if event in RAN], name
        assert not (tmp_path / "ran").exists(), name
        assert not list((tmp_path / "cache").glob("*")), name


def write(folder: Path, content: bytes | Callable[[Path], None]) -> Path:
    folder.mkdir()
    path = folder / "pytorch_model.bin"
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    return folder
