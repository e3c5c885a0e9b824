"""Adapters that somebody has tampered with: each is refused with a reason, at once, and the model is as it was.

The list is that of edits which make peft 0.21 load wrong weights in silence, warn, run out of memory or hang. What a folder
of peft's two files cannot tell (another alpha, another base of the same shapes) the side file lorakit.json does.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from lorakit.errors import AdapterError
from lorakit.inference.predictor import load
from lorakit.lora import BaseInfo, LoraConfig, add_adapter, hosts, load_adapter, save_adapter
from lorakit.lora.peft_config import MAX_BYTES
from lorakit.lora.peft_files import MAX_HEADER, MAX_TENSORS, read_header
from tests.lora.fuzz import fuzz
from tests.lora.oracle import assert_unchanged, fill, snapshot
from tests.runs import save_bert
from tests.tiny import tiny_bert

JSON, WEIGHTS, SIDE = "adapter_config.json", "adapter_model.safetensors", "lorakit.json"
CONFIG = LoraConfig(r=4, target_modules=("query", "value"), modules_to_save=("classifier",))
SECONDS, BYTES = 0.05, 10 * 2**20
FUZZED = 400  # all 100,000: python -m tests.lora.fuzz 100000
Edit = Callable[[Path], None]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_bert()
    add_adapter(model, CONFIG)
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(fill(model), folder, CONFIG, BaseInfo("some/base", None, "SEQ_CLS"))
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "adapter")
    return tmp_path / "adapter"


# What an edit costs


class Allocated(TorchDispatchMode):
    """Counts the bytes of every tensor that an operation gives, views included: no less than what was allocated."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        self.total += answer.nbytes if isinstance(answer, Tensor) else 0
        return answer


def refusal(call: Callable[[], object]) -> str:
    """The reason, after checking that it is one line and came within the limits of time and memory."""
    durations = []
    for _ in range(2):  # of CPU time the better one: other processes share the machine
        start = time.thread_time()
        with pytest.raises(AdapterError):
            call()
        durations.append(time.thread_time() - start)
    tracemalloc.start()
    with Allocated() as tensors, pytest.raises(AdapterError) as caught:
        call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert min(durations) < SECONDS
    assert peak + tensors.total < BYTES
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_refused(model: PreTrainedModel, folder: Path, *parts: str) -> None:
    before = snapshot(model)
    reason = refusal(lambda: load_adapter(model, folder))
    assert_unchanged(model, before)
    assert hosts(model) == []
    assert str(folder) in reason
    assert [part for part in parts if part not in reason] == []


# The edits


def settings(**changes: Any) -> Edit:
    def edit(folder: Path) -> None:
        raw = json.loads((folder / JSON).read_text())
        (folder / JSON).write_text(json.dumps({**raw, **changes}))

    return edit


def tensors(change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> Edit:
    def edit(folder: Path) -> None:
        save_file(dict(change(load_file(folder / WEIGHTS))), folder / WEIGHTS)

    return edit


def cut(name: str, size: int) -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:size])

    return edit


def header(raw: bytes, data: bytes = b"", length: int | None = None) -> Edit:
    def edit(folder: Path) -> None:
        (folder / WEIGHTS).write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)

    return edit


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "adapter_model.bin")


def ending(tensors: Mapping[str, Tensor], name: str) -> str:
    return next(key for key in tensors if key.endswith(name))


def layer_7(t: dict[str, Tensor]) -> dict[str, Tensor]:
    key = ending(t, "lora_A.weight")
    return t | {key.replace("layer.0", "layer.7"): t[key].clone()}


HUGE = b'{"w":{"dtype":"F32","shape":[' + b"9," * 300_000 + b'9],"data_offsets":[0,4]}}'
TWICE = b'{"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
MANY = json.dumps({str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(MAX_TENSORS + 1)})

EVERY: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "B is NaN": (
        tensors(lambda t: {k: v * float("nan") if "lora_B" in k else v for k, v in t.items()}),
        (WEIGHTS, "lora_B.weight holds NaN or infinite values"),
    ),
    "head missing": (
        tensors(lambda t: {k: v for k, v in t.items() if "classifier" not in k}),
        (WEIGHTS, "lacks 2 of 14 tensors", "classifier"),
    ),
    "keys renamed": (
        tensors(lambda t: {k.replace("bert", "roberta"): v for k, v in t.items()}),
        (WEIGHTS, "lacks 12 of 14 tensors"),
    ),
    "a layer too many": (tensors(layer_7), (WEIGHTS, "has unexpected 1 of 14 tensors", "layer.7")),
    "rows of A cut": (
        tensors(lambda t: t | {ending(t, "lora_A.weight"): t[ending(t, "lora_A.weight")][:3].clone()}),
        (WEIGHTS, "has shape (3, 32)", "need (4, 32)"),
    ),
    "another r": (settings(r=8), (WEIGHTS, "has shape (4, 32)", "need (8, 32)")),
    "alpha infinite": (settings(lora_alpha=float("inf")), (JSON, "lora_alpha = inf")),
    "weights are int32": (
        tensors(lambda t: {k: v.to(torch.int32) for k, v in t.items()}),
        (WEIGHTS, "dtype I32; only F64, F32, F16, BF16 are weights"),
    ),
    "weights cut off": (cut(WEIGHTS, 1000), (WEIGHTS, "damaged")),
    "settings cut off": (cut(JSON, 200), (JSON, "not JSON")),
    "r of a million": (settings(r=10**6), (WEIGHTS, "has shape (4, 32)", "need (1000000, 32)")),
    "endless pattern": (settings(target_modules="([a-z.0-9]+)+X"), ("target_modules", "([a-z.0-9]+)+X")),
    "A infinite": (
        tensors(lambda t: {k: v / 0 if "lora_A" in k else v for k, v in t.items()}),
        (WEIGHTS, "holds NaN or infinite"),
    ),
    "another pooler": (
        tensors(lambda t: t | {"base_model.model.bert.pooler.dense.weight": torch.ones(32, 32)}),
        ("pooler.dense.weight differs from the model's own",),
    ),
    "setting of a newer peft": (settings(new_in_peft=3, peft_version="1.0"), (JSON, "new_in_peft = 3")),
    "r of a billion": (settings(r=10**9), (WEIGHTS, "has shape (4, 32)")),
    "rank of a billion for one layer": (settings(rank_pattern={"query": 10**9}), (WEIGHTS, "has shape (4, 32)")),
    "endless rank pattern": (settings(rank_pattern={".*" * 600 + "X": 4}), ("rank_pattern",)),
    "settings of many megabytes": (settings(revision="x" * MAX_BYTES), (JSON, "at most")),
    "settings nested deep": (lambda f: (f / JSON).write_text("[" * 200_000) and None, (JSON, "nested too deep")),
    "a number of 5,000 digits": (
        lambda f: (f / JSON).write_text('{"r": ' + "9" * 5000 + "}") and None,
        (JSON, "a number of 5,000 digits"),
    ),
    "pickle in place of weights": (pickled, ("adapter_model.bin", "never read")),
    "header of 89 MB": (header(b"{" + b" " * MAX_HEADER, length=89_000_000), (WEIGHTS, "damaged")),
    "header too long": (header(b"{" + b" " * MAX_HEADER), (WEIGHTS, "damaged")),
    "key twice": (header(TWICE, bytes(4)), (WEIGHTS, "appears twice")),
    "more tensors than any adapter": (header(MANY.encode()), (WEIGHTS, "10,001 tensors")),
    "shape of 300,000 numbers": (header(HUGE, bytes(4)), (WEIGHTS, "damaged: more than 100,000 values")),
}


@pytest.mark.parametrize("name", EVERY)
def test_harmful_edit_is_refused(name: str, folder: Path) -> None:
    edit, parts = EVERY[name]
    edit(folder)
    assert_refused(tiny_bert(), folder, *parts)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"hidden_size": 64}, ("has shape (4, 32)", "need (4, 64)")),
        ({"num_hidden_layers": 4}, ("lacks 4 of 18", "layer.3")),
    ],
    ids=["wider", "deeper"],
)
def test_base_of_another_size_is_refused(change: dict[str, int], parts: tuple[str, ...], folder: Path) -> None:
    assert_refused(tiny_bert(**change), folder, WEIGHTS, *parts)


def test_untouched_folder_is_taken(folder: Path) -> None:
    model = tiny_bert()
    load_adapter(model, folder)
    assert hosts(model)


# What only the side file tells


@pytest.fixture
def shipped(bert_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(bert_run / "adapter", tmp_path / "shipped")
    return tmp_path / "shipped"


TOLD: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "another alpha": (settings(lora_alpha=9999), (JSON, "changed since it was written", SIDE)),
    "the name of another base": (
        settings(base_model_name_or_path="gpt2"),
        (JSON, "changed since it was written", SIDE),
    ),
}


@pytest.mark.parametrize("name", TOLD)
def test_edit_that_leaves_every_shape_is_refused(name: str, shipped: Path) -> None:
    edit, parts = TOLD[name]
    edit(shipped)
    reason = refusal(lambda: load(shipped))
    assert [part for part in (str(shipped), *parts) if part not in reason] == []


def test_another_base_of_the_same_shapes_is_refused_before_it_is_loaded(shipped: Path, tmp_path: Path) -> None:
    side = json.loads((shipped / SIDE).read_text(encoding="utf-8"))
    side["base"]["name"] = str(save_bert(tmp_path / "base", seed=5))
    (shipped / SIDE).write_text(json.dumps(side), encoding="utf-8")
    assert f"{shipped}: trained on a different {tmp_path / 'base'}: its weights have sha256" in refusal(
        lambda: load(shipped)
    )


# No pickle, and headers damaged at random

WATCHED = ("pickle.find_class", "exec", "compile", "os.system", "subprocess.Popen", "socket.connect", "import")


@pytest.fixture
def events() -> Iterator[list[tuple[str, Any]]]:
    """What Python's audit hooks tell of, until the test ends: a hook itself can never be taken away."""
    seen: list[tuple[str, Any]] = []
    watching = [True]
    sys.addaudithook(lambda event, args: seen.append((event, args)) if watching[0] else None)
    yield seen
    watching[0] = False


def test_loading_runs_no_code_of_the_folder_and_opens_two_files(folder: Path, events: list[tuple[str, Any]]) -> None:
    torch.save({"x": torch.ones(1)}, folder / "adapter_model.bin")  # which peft would take where the other is missing
    load_adapter(tiny_bert(), folder)  # imports what is imported lazily
    model = tiny_bert()
    events.clear()
    load_adapter(model, folder)
    seen = list(events)
    assert [event for event, _ in seen if event in WATCHED] == []
    opened = {Path(args[0]).name for event, args in seen if event == "open" and str(folder) in str(args[0])}
    assert {JSON} <= opened <= {JSON, WEIGHTS}


def test_header_damaged_at_random_is_refused_or_read_as_the_library_does(tmp_path: Path) -> None:
    outcome = fuzz(FUZZED, tmp_path)
    assert outcome.accepted > 0
    assert outcome.refused > outcome.accepted
    assert outcome.longest_s < 1


# The check of a safetensors header before anything is allocated.


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def written(path: Path, header: Any, data: bytes = b"\0" * 8) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def test_header_equals_what_the_library_reads(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.ones(1, dtype=torch.float16)}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    assert {key: info.shape for key, info in read_header(path).items()} == {k: t.shape for k, t in tensors.items()}


DAMAGED = {
    "empty file": b"",
    "seven bytes": b"\1" * 7,
    "length beyond the file": (2**63).to_bytes(8, "little") + b"{}",
    "length above the limit": (MAX_HEADER + 1).to_bytes(8, "little") + b" " * (MAX_HEADER + 1),
}


@pytest.mark.parametrize("raw", DAMAGED.values(), ids=DAMAGED)
def test_file_without_a_header_is_refused(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    with pytest.raises(AdapterError, match="damaged"):
        read_header(path)


BAD_HEADERS = {
    "no JSON": b"{",
    "leading space": b' {"w": 1}',
    "invalid UTF-8": b'{"\xff": 1}',
    "nested without end": b"[" * 5000,
    "a list": [],
    "entry no object": {"w": 1},
    "key twice": b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "integers": {"w": {**ENTRY, "dtype": "I32"}},
    "complex": {"w": {**ENTRY, "dtype": "C64", "shape": [1]}},
    "dtype of control characters": {"w": {**ENTRY, "dtype": "\x1b[31m\n" * 500}},
    "name of control characters": {"\x1b[31m\n": {**ENTRY, "dtype": "I32"}},
    "negative shape": {"w": {**ENTRY, "shape": [-2]}},
    "huge shape": {"w": {**ENTRY, "shape": [0, 2**63 - 1]}},
    "shape too large": {"w": {**ENTRY, "shape": [3]}},
    "overlap": {"v": ENTRY, "w": ENTRY},
    "gap": {"w": {**ENTRY, "shape": [1], "data_offsets": [4, 8]}},
    "trailing bytes": {"w": {**ENTRY, "shape": [1], "data_offsets": [0, 4]}},
    "offsets no numbers": {"w": {**ENTRY, "data_offsets": [0.0, 8.0]}},
    "offsets beyond 64 bits": {"w": {**ENTRY, "data_offsets": [0, 2**64 + 8]}},
    "shape beyond 64 bits": {"w": {**ENTRY, "shape": [2**32, 2**32]}},
    "offsets turned round": {"w": {**ENTRY, "data_offsets": [8, 0]}},
    "hole between tensors": {
        "v": {**ENTRY, "dtype": "F16", "shape": [1], "data_offsets": [0, 2]},
        "w": {**ENTRY, "shape": [1], "data_offsets": [4, 8]},
    },
    "metadata of numbers": {"__metadata__": {"format": 1}, "w": ENTRY},
    "offsets missing": {"w": {"dtype": "F32", "shape": [2]}},
    "too many tensors": {str(i): {**ENTRY, "shape": [1]} for i in range(MAX_TENSORS + 1)},
}


@pytest.mark.parametrize("header", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_bad_header_is_refused(header: Any, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="damaged") as caught:
        read_header(written(tmp_path / "x.safetensors", header))
    assert str(caught.value).isprintable()
