"""lorakit.json in the hands of somebody else: refused with its key, in a moment, and nothing else is opened."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import AdapterError
from lorakit.inference.adapter_folder import read_side, write_side
from lorakit.inference.side import MOST_ENTRIES, SIDE_FILE
from lorakit.recipe import TaskSection

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SUM = "0" * 64


@pytest.fixture
def folder(bert_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(bert_run / "adapter", tmp_path / "adapter")


def refusal(folder: Path) -> str:
    """The one line that says why, which must name the folder and take a moment."""
    began = time.thread_time()
    with pytest.raises(AdapterError) as caught:
        read_side(folder)
    assert time.thread_time() - began < 2
    said = str(caught.value)
    assert str(folder) in said
    assert "\n" not in said
    assert len(said) < 400 + len(str(folder))
    return said.replace(str(folder / SIDE_FILE), "").removeprefix(": damaged: ")


# The whole file
WHOLE: dict[str, tuple[str, str]] = {
    "a list": ("[]", "holds a list, not an object"),
    "null": ("null", "holds null, not an object"),
    "a number": ("7", "holds a number, not an object"),
    "nothing": ("", "not JSON"),
    "cut off": ('{"task"', "not JSON"),
    "nested deep": ('{"task":' + "[" * 99_000, "nested too deep"),
    "a key twice": ('{"format": 1, "format": 1}', "the key 'format' appears twice"),
    "half of a pair": ('{"labels": ["\\ud800"]}', "'labels' holds half of a surrogate pair"),
    "a huge number": ('{"max_length": ' + "9" * 5000 + "}", "a number of 5,000 digits"),
    "a newer format": ('{"format": 2}', "format 2 was written by a newer lorakit; this one reads 1"),
    "a format of text": ('{"format": "1"}', "format '1' not 1"),
    "an export": ('{"export": "onnx"}', "an export to onnx"),
}


@pytest.mark.parametrize(("text", "says"), WHOLE.values(), ids=WHOLE)
def test_damaged_file_is_refused(text: str, says: str, folder: Path) -> None:
    (folder / SIDE_FILE).write_text(text)
    assert says in refusal(folder)


# Single values
VALUES: dict[str, tuple[Any, str]] = {
    "task": (None, "task = None: should be an object"),
    "task.name": ("chat", "task.name = 'chat': should be 'sequence_classification'"),
    "task.metric": (3, "task.metric = 3: should be text"),
    "labels": ("ab", "labels = 'ab': should be a list"),
    "labels ": (["a", 3], "labels.1 = 3: should be text"),
    "labels  ": (["a", "a"], "should be different labels; 'a' appears twice"),
    "labels   ": ([None] * 10**6, "labels.0 = None: should be text"),
    "labels    ": ([], "labels = []: sequence_classification should have at least one"),
    "max_length": ("64", "max_length = '64': should be a whole number"),
    "max_length ": (0, "max_length = 0: should be greater than or equal to 1"),
    "max_length  ": (10**3000, "max_length = 1000"),
    "base": (["bert"], "base = ['bert']: should be an object"),
    "base.name": (None, "base.name = None: should be text"),
    "base.name ": ("x" * 5000, "should have at most 4096 characters"),
    "base.sha256": ("abc", "base.sha256 = 'abc': should match"),
    "columns": ([], "columns = []: should be an object"),
    "columns.label": ([1], "columns.label = (1,): should be text"),
    "columns.overlaps": ("both", "columns.overlaps = 'both': should be 'error' or 'longest'"),
    "dtype": ("fp8", "dtype = 'fp8': should be 'fp32', 'bf16' or 'fp16'"),
    "quantize": ({}, "quantize = {}: should be 'none'"),
    "method": (1, "method = 1: should be 'lora'"),
    "tuned": ([1], "tuned = [1]: should be an object"),
    "tuned.temperature": (1e-320, "should be a number above 1e-09 for temperature"),
    "tuned.temperature ": (float("nan"), "should be finite numbers"),
    "data": ({"a": 1}, "data.a = 1: should be text"),
    "data ": (dict.fromkeys(map(str, range(MOST_ENTRIES + 1)), 1), "should be an object of at most 100,000 entries"),
    "files": (["x"], "files = ['x']: should be an object"),
    "files ": ({"../../etc/passwd": SUM}, "should be 'adapter_config.json' or 'adapter_model.safetensors'"),
    "files  ": ({CONFIG: 3}, "should be text"),
}


@pytest.mark.parametrize(("key", "value", "says"), [(key, *rest) for key, rest in VALUES.items()], ids=VALUES)
def test_wrong_value_is_refused_by_its_key(key: str, value: Any, says: str, folder: Path) -> None:
    raw = json.loads((folder / SIDE_FILE).read_text())
    section, _, name = key.strip().partition(".")
    raw[section] = {**raw[section], name: value} if name else value
    (folder / SIDE_FILE).write_text(json.dumps(raw))
    assert says in refusal(folder)


def test_missing_key_is_named(folder: Path) -> None:
    whole = json.loads((folder / SIDE_FILE).read_text())
    for key in ("format", "task", "labels", "max_length", "base", "columns", "dtype", "method"):
        (folder / SIDE_FILE).write_text(json.dumps({name: whole[name] for name in whole if name != key}))
        assert ("format None" if key == "format" else f"{key} is missing") in refusal(folder)


# What lies there in place of a file


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(30 * 2**30)


KINDS: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "nothing": lambda path: path.symlink_to("nowhere"),
    "30 GB": sparse,
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_refused_at_once(kind: str, bert_run: Path, tmp_path: Path) -> None:
    for name in (SIDE_FILE, CONFIG, WEIGHTS):
        folder = shutil.copytree(bert_run / "adapter", tmp_path / name)
        (folder / name).unlink()
        KINDS[kind](folder / name)
        message = refusal(folder)
        assert any(words in message for words in ("cannot be read", "damaged", f"no {name}"))


def test_many_labels_are_read_in_a_moment(folder: Path) -> None:
    raw = json.loads((folder / SIDE_FILE).read_text())
    raw["labels"] = [f"label {i} of many" for i in range(200_000)]
    raw["task"] |= {"name": "ordinal_classification", "order": raw["labels"]}
    (folder / SIDE_FILE).write_text(json.dumps(raw))
    began = time.thread_time()
    side = read_side(folder)
    assert time.thread_time() - began < 2
    assert len(side.labels) == 200_000
    assert isinstance(side.task, TaskSection)


def test_what_is_written_is_what_is_read(folder: Path) -> None:
    """The schema says all that lorakit writes: reading and writing again changes no byte."""
    before = (folder / SIDE_FILE).read_bytes()
    write_side(folder, read_side(folder))
    assert (folder / SIDE_FILE).read_bytes() == before
