"""Give adapter folders that somebody has tampered with to the commands: each ends at once, in one line, with its own code.

A program: `python -m tests.faults.hostile`. It makes a tiny run, then for each kind of folder forks a process for each
command, and counts exit codes, seconds and memory.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lorakit.app.cli import main
from lorakit.hashing import fingerprint_of
from tests.runs import changed, fit, save_bert, sections, write_reviews

SIDE, CONFIG, WEIGHTS = "lorakit.json", "adapter_config.json", "adapter_model.safetensors"
COMMANDS: dict[str, Sequence[str]] = {
    "predict": ("predict", "hostile", "a superb film"),
    "inspect": ("inspect", "hostile"),
    "import": ("import", "hostile", "--out", "out", "--labels", "bad,good", "--dry-run"),
    "serve": ("serve", "hostile", "--dry-run"),
    "merge": ("merge", "hostile", "--out", "out", "--dry-run"),
    "export": ("export", "hostile", "--to", "peft", "--out", "out", "--dry-run"),
    "push": ("push", "hostile", "someone/something", "--dry-run"),
}
MOST_SECONDS, MOST_BYTES = 5.0, 10**9
GIVE_UP = 20  # seconds after which a command is killed
Edit = Callable[[Path], None]


def write(name: str, content: bytes | str) -> Edit:
    data = content if isinstance(content, bytes) else content.encode()

    def edit(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(data)

    return edit


def place(name: str, kind: str) -> Edit:
    """Something that is not a file, or an endless one, in a file's place."""

    def edit(folder: Path) -> None:
        path = folder / name
        path.unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "30 GB":
            with path.open("wb") as file:
                file.truncate(30 * 2**30)
        elif kind != "nothing":
            path.symlink_to(kind)

    return edit


def key(name: str, dotted: str, value: Any) -> Edit:
    """A JSON file with one value exchanged (of ..., taken away)."""

    def edit(folder: Path) -> None:
        raw = inner = json.loads((folder / name).read_text())
        *outer, last = dotted.split(".")
        for part in outer:
            inner = inner[part]
        if value is ...:
            del inner[last]
        else:
            inner[last] = value
        (folder / name).write_text(json.dumps(raw))

    return edit


def tensors(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Edit:
    def edit(folder: Path) -> None:
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)

    return edit


def base(edit_base: Edit, name: str = "base") -> Edit:
    """The adapter over a base that lies in its own folder, edited, whose fingerprint lorakit.json has where there is one."""

    def edit(folder: Path) -> None:
        shutil.copytree(folder.parent / "base", folder / "base")
        edit_base(folder / "base")
        try:
            found = fingerprint_of(folder / "base")._asdict() if (folder / "base" / "config.json").is_file() else {}
        except Exception:
            found = {}
        named(name if name != "base" else str(folder / "base"))(folder)
        for part, field_ in (("weights", "sha256"), ("config", "config_sha256"), ("tokenizer", "tokenizer_sha256")):
            if part in found:
                key(SIDE, f"base.{field_}", found[part])(folder)

    return edit


def named(name: Any) -> Edit:
    """The adapter with another name for its base."""

    def edit(folder: Path) -> None:
        key(CONFIG, "base_model_name_or_path", name)(folder)
        key(SIDE, "base.name", name)(folder)

    return edit


def nothing(folder: Path) -> None:
    """The folder as it was written."""


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "adapter_model.bin")


def header(raw: bytes, data: bytes = b"", length: int | None = None) -> Edit:
    return write(WEIGHTS, (len(raw) if length is None else length).to_bytes(8, "little") + raw + data)


WRONG: dict[str, Any] = {
    "null": None,
    "a number": 7,
    "a negative": -1,
    "text": "x",
    "a list": [1],
    "an object": {"a": {"b": [None]}},
    "true": True,
    "NaN": float("nan"),
    "a huge number": 10**4000,
    "100 KB": "x" * 100_000,
}
FILES = ("pipe", "folder", "30 GB", "nothing", "/dev/zero", "/dev/stdin", "nowhere", "/proc/self/environ")
TEXTS: dict[str, bytes | str] = {
    "empty": "",
    "a list": "[]",
    "null": "null",
    "a number": "7",
    "text": '"x"',
    "cut off": '{"a": [1',
    "not UTF-8": b"\xff{}",
    "nested deep": '{"a":' * 99_000,
    "a key twice": '{"format": 1, "format": 1}',
    "half of a pair": '{"labels": ["\\ud800"]}',
    "5,000 digits": '{"format": ' + "9" * 5000 + "}",
    "10 MB of lists": '{"a": [' + "[]," * 3_400_000 + "[]]}",
    "10 MB of numbers": '{"labels": [' + "1," * 5_000_000 + "1]}",
    "zeros": bytes(10**6),
}


DECIDING = "format task task.name labels max_length base base.name base.sha256 columns dtype"
TELLING = "method quantize tuned files data columns.label base.revision versions scores"
SHAPING = "r lora_alpha target_modules rank_pattern modules_to_save base_model_name_or_path"
BESIDE = "bias lora_dropout alpha_pattern exclude_modules layers_to_transform use_dora task_type"
ANY, FEW, OTHER = tuple(WRONG), ("null", "text", "a list"), ("text", "a list", "an object")


def kinds() -> dict[str, Edit]:
    """The edits of an adapter's folder, by name."""
    edits: dict[str, Edit] = {"untouched": nothing}
    for name in (SIDE, CONFIG, WEIGHTS):
        edits |= {f"{name}: {kind}": place(name, kind) for kind in FILES}
        edits |= {f"{name}: {kind}": write(name, text) for kind, text in TEXTS.items()}
    for name, keys, values in (
        (SIDE, DECIDING, ANY),
        (SIDE, TELLING, FEW),
        (CONFIG, SHAPING, ANY),
        (CONFIG, BESIDE, OTHER),
    ):
        for dotted in keys.split():
            edits |= {f"{name}: {dotted} = {kind}": key(name, dotted, WRONG[kind]) for kind in values}
    for name in ("task", "labels", "base", "columns", "method"):
        edits[f"{SIDE}: without {name}"] = key(SIDE, name, ...)
    for name in ("peft_type", "r", "target_modules"):
        edits[f"{CONFIG}: without {name}"] = key(CONFIG, name, ...)
    return edits | _settings() | _weights() | _bases()


def _settings() -> dict[str, Edit]:
    many = [f"label {i}" for i in range(200_000)]
    return {
        "200,000 labels": key(SIDE, "labels", many),
        "one label": key(SIDE, "labels", ["a"]),
        "no labels": key(SIDE, "labels", []),
        "labels of 1 MB": key(SIDE, "labels", ["a" * 10**6, "b"]),
        "labels of escapes": key(SIDE, "labels", ["\x1b[2J", "\x00"]),
        "the same label twice": key(SIDE, "labels", ["a", "a"]),
        "one token": key(SIDE, "max_length", 1),
        "a million tokens": key(SIDE, "max_length", 10**6),
        "another task": key(SIDE, "task.name", "token_classification"),
        "a text-to-text task": key(SIDE, "task.name", "text2text_ner"),
        "a CRF": key(SIDE, "task", {"name": "token_classification", "crf": True}),
        "an unknown metric": key(SIDE, "task.metric", "x"),
        "full": key(SIDE, "method", "full"),
        "nf4": key(SIDE, "quantize", "nf4"),
        "int8": key(SIDE, "quantize", "int8"),
        "bf16": key(SIDE, "dtype", "bf16"),
        "temperature 0": key(SIDE, "tuned", {"temperature": 0}),
        "tuned for another task": key(SIDE, "tuned", {"thresholds": {"a": 1}}),
        "guarded: /etc/passwd": key(SIDE, "files", {"/etc/passwd": "0" * 64}),
        "guarded: ../..": key(SIDE, "files", {"../..": "0" * 64}),
        "unguarded": key(SIDE, "files", {}),
        "r of a billion": key(CONFIG, "r", 10**9),
        "alpha of 1e300": key(CONFIG, "lora_alpha", 1e300),
        "pattern without end": key(CONFIG, "target_modules", "([a-z.0-9]+)+X"),
        "100,000 targets": key(CONFIG, "target_modules", [f"m{i}" for i in range(60_000)]),
        "100,000 ranks": key(CONFIG, "rank_pattern", {f"m{i}": 4 for i in range(60_000)}),
        "every block": key(CONFIG, "layers_to_transform", list(range(100_000))),
        "a billion rows": key(CONFIG, "trainable_token_indices", [10**9]),
        "scores.json: a list": write("scores.json", "[]"),
        "scores.json: wrong types": write("scores.json", '{"accuracy": 1.0, "per_class": {"a": 3}, "errors": 1}'),
        "scores.json: a pipe": place("scores.json", "pipe"),
        "adapter/: a file": write("adapter", "x"),
        "tokenizer.json: a pipe": place("tokenizer.json", "pipe"),
        "pickled weights": pickled,
    }


FOUR = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


def _weights() -> dict[str, Edit]:
    many = json.dumps({str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)})
    huge = b'{"w":{"dtype":"F32","shape":[' + b"9," * 300_000 + b'9],"data_offsets":[0,4]}}'
    return {
        "no tensors": tensors(lambda t: {}),
        "NaN": tensors(lambda t: {k: v * float("nan") for k, v in t.items()}),
        "infinite": tensors(lambda t: {k: v / 0 for k, v in t.items()}),
        "float64": tensors(lambda t: {k: v.double() for k, v in t.items()}),
        "int8 weights": tensors(lambda t: {k: v.to(torch.int8) for k, v in t.items()}),
        "transposed": tensors(lambda t: {k: v.T.contiguous() for k, v in t.items()}),
        "no head": tensors(lambda t: {k: v for k, v in t.items() if "classifier" not in k}),
        "renamed": tensors(lambda t: {f"x{k}": v for k, v in t.items()}),
        "one more": tensors(lambda t: t | {"more": torch.ones(3)}),
        "names of 100 KB": tensors(lambda t: t | {"m" * 100_000: torch.ones(3)}),
        "header of 89 MB": header(b"{" + b" " * 10**6, length=89_000_000),
        "header beyond the file": header(b"{}", length=2**63),
        "header of nothing": header(b""),
        "20,000 tensors": header(many.encode()),
        "shape of 300,000 numbers": header(huge, bytes(4)),
        "overlapping": header(f'{{"a":{FOUR},"b":{FOUR}}}'.encode(), bytes(4)),
        "negative shape": header(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', bytes(4)),
        "metadata of numbers": header(b'{"__metadata__":{"a":1}}'),
    }


NAMES = ("", ".", "..", "/", "/dev/null", "/dev/zero", "hostile", "x" * 5000, "a\0b", "https://example.org/x", "a/b")
NAMES += ("\x1b[2J", "a/" * 2000, "~", "/proc/self", "--help", " ")
OF_CONFIG: dict[str, Sequence[Any]] = {
    "model_type": (None, "x", ["bert"]),
    "hidden_size": (0, "16"),
    "num_hidden_layers": (10**6, -1),
    "num_attention_heads": (3, 0),
    "vocab_size": (-5, 10**9),
    "hidden_act": ("x",),
    "max_position_embeddings": (0,),
    "pad_token_id": (10**6,),
    "quantization_config": ({"quant_method": "x"},),
    "attn_implementation": ("own/kernel",),
    "dtype": ("x",),
    "layer_norm_eps": ("x",),
    "id2label": ([],),
    "rope_parameters": (3,),
    "is_decoder": (True,),
    "transformers_weights": ("../../x.safetensors",),
}


def _bases() -> dict[str, Edit]:
    found = {f"base: {name[:30]!r}": named(name) for name in NAMES}
    auto = {"AutoConfig": "own.Config", "AutoModelForSequenceClassification": "own.Model"}

    def with_code(folder: Path) -> None:
        (folder / "own.py").write_text("raise SystemExit('code of the base ran')\n")
        for name, value in (("model_type", "own"), ("auto_map", auto)):
            key("config.json", name, value)(folder)

    edits: dict[str, Edit] = {"with code": with_code, "untouched": nothing}
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        for kind in ("pipe", "folder", "nothing", "/dev/zero", "nowhere"):
            edits[f"{name}: {kind}"] = place(name, kind)
        for kind in ("empty", "a list", "cut off", "nested deep", "not UTF-8"):
            edits[f"{name}: {kind}"] = write(name, TEXTS[kind])
    for name, values in OF_CONFIG.items():
        for value in values:
            edits[f"config.json: {name} = {str(value)[:20]}"] = key("config.json", name, value)
    edits["30 GB of weights"] = place("model.safetensors", "30 GB")
    edits["an adapter beside it"] = write("adapter_config.json", "{}")

    def elsewhere(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "x.safetensors")
        write("model.safetensors.index.json", '{"weight_map": {"a": "../../base/model.safetensors"}}')(folder)

    edits["weights elsewhere"] = elsewhere
    return found | {f"base: {kind}": base(edit) for kind, edit in edits.items()}


@dataclass
class Figures:
    """What the commands did: exit codes, the longest and the largest, and whatever must not be."""

    kinds: int = 0
    codes: Counter[int] = field(default_factory=Counter)
    seconds: float = 0.0
    bytes: int = 0
    faults: list[str] = field(default_factory=list)


def resum(folder: Path) -> None:
    """Let lorakit.json guard what is there now: whoever edits the files edits it too."""
    try:
        raw = json.loads((folder / SIDE).read_text())
        for name in raw["files"]:
            if (folder / name).is_file() and (folder / name).stat().st_size < 10**8:
                raw["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        (folder / SIDE).write_text(json.dumps(raw))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, AttributeError):
        pass  # it is what has been damaged


def outcome(words: Sequence[str], room: Path) -> tuple[int, float, int, str]:
    """Exit code, seconds, bytes and stderr of a command in a process of its own, in a folder."""
    began, stderr = time.perf_counter(), room / "stderr"
    if (child := os.fork()) == 0:
        os.chdir(room)
        for number, path in ((0, "/dev/null"), (1, "/dev/null"), (2, stderr)):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        code = 0
        try:
            main(list(words))
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 99
        except BaseException:
            code = 98
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        if time.perf_counter() - began > GIVE_UP:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    text = stderr.read_text(errors="replace") if stderr.exists() else ""
    return os.waitstatus_to_exitcode(status), time.perf_counter() - began, usage.ru_maxrss * 1024, text


def run(kinds: dict[str, Edit], commands: Sequence[str], room: Path, report: Callable[[str], None] = print) -> Figures:
    """Every command on every kind of folder."""
    save_bert(room / "base")
    write_reviews(room / "train.csv", 36, 1)
    write_reviews(room / "validation.csv", 12, 2)
    recipe = changed(sections(room / "base", room), "train.max_steps=2")
    shutil.copytree(fit(recipe, room / "run").folder / "adapter", room / "adapter")
    for module in ("app.api", "app.export.adapters", "app.server.process", "app.server.routes"):
        importlib.import_module(f"lorakit.{module}")  # once, and not in each process
    figures = Figures(len(kinds))
    for kind, edit in kinds.items():
        for line in _faults(kind, edit, commands, room, figures):
            figures.faults.append(line)
            report(line)
    return figures


def _faults(kind: str, edit: Edit, commands: Sequence[str], room: Path, figures: Figures) -> Iterator[str]:
    folder = room / "hostile"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(room / "adapter", folder)
    edit(folder)
    resum(folder)
    for command in commands:
        code, seconds, size, printed = outcome(COMMANDS[command], room)
        figures.codes[code] += 1
        figures.seconds, figures.bytes = max(figures.seconds, seconds), max(figures.bytes, size)
        last = printed.splitlines()[-1][:200] if printed else ""
        if code not in (0, 2, 3) or (code and printed.count("\n") > 3):
            yield f"{command}: {kind}: code {code}: {last}"
        if kind == "untouched" and code:
            yield f"{command}: {kind}: refused: {last}"
        if seconds > MOST_SECONDS or size > MOST_BYTES:
            yield f"{command}: {kind}: {seconds:.1f} s, {size / 1e6:.0f} MB: {last}"
        if (room / "out").exists():
            yield f"{command}: {kind}: out was written"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commands", nargs="+", default=list(COMMANDS), choices=list(COMMANDS))
    parser.add_argument("--only", default="", help="kinds whose name has this in it")
    options = parser.parse_args()
    chosen = {kind: edit for kind, edit in kinds().items() if options.only in kind}
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as name:
        figures = run(chosen, options.commands, Path(name))
    print(f"{figures.kinds} kinds of folders, {figures.codes.total()} commands, codes {dict(figures.codes)}")
    print(f"at most {figures.seconds:.1f} s and {figures.bytes / 1e6:.0f} MB; {len(figures.faults)} faults")
    sys.exit(bool(figures.faults))
