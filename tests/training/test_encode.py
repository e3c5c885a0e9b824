"""Items from a cache on disk: those that are encoded in memory, read as they are asked for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import DataError
from lorakit.tasks.sequence import SequenceClassification
from lorakit.training import encode
from lorakit.training.encode import FACTS, CachedItems, write_items
from lorakit.training.prepare import prepare
from tests.runs import changed, fit, sections, weights

IDS = st.lists(st.integers(-100, 2**31 - 1), max_size=4)
FLOATS = st.lists(st.floats(allow_nan=False), min_size=1, max_size=3)
ITEMS = st.fixed_dictionaries({"input_ids": IDS}, optional={"labels": st.one_of(IDS, FLOATS), "first": IDS})
EXAMPLES = st.lists(st.lists(st.lists(ITEMS, max_size=3), max_size=3), min_size=1, max_size=3)  # in chunks


def alike(value: Any) -> Any:
    """Equal only where the types are too."""
    return [(key, [(type(v), v) for v in row]) for item in value for key, row in sorted(item.items())]


@given(chunks=EXAMPLES)
def test_items_are_read_as_they_were_written(tmp_path_factory: pytest.TempPathFactory, chunks: Any) -> None:
    examples = [items for chunk in chunks for items in chunk]
    if not examples:
        return
    folder = tmp_path_factory.mktemp("cache")
    write_items(folder, chunks)
    found = CachedItems(folder)
    assert list(map(alike, found)) == list(map(alike, examples))
    assert alike(found.flat) == alike([item for items in examples for item in items])
    assert [alike(items) for items in found[1:]] == [alike(items) for items in examples[1:]]


@pytest.mark.parametrize(
    ("base", "task"),
    [
        ("bert", "sequence_classification"),
        ("bert", "sequence_regression"),
        ("bert", "multi_label_classification"),
        ("roberta", "token_classification"),
        ("t5", "text2text_ner"),
    ],
)
def test_cache_gives_what_memory_gives(
    base: str, task: str, files: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = sections(request.getfixturevalue(base), files, task)
    words = ("data.max_length=12",) if task == "token_classification" else ()  # so that there are windows
    plain = prepare(changed(raw, *words)).parts
    monkeypatch.setattr("lorakit.inference.answer.CHUNK", 5)
    cached = prepare(changed(raw, *words, f"data.cache={tmp_path}")).parts
    for name, part in plain.items():
        assert isinstance(cached[name].items, CachedItems)
        assert list(map(alike, cached[name].items)) == list(map(alike, part.items))
        assert cached[name].sha256 == part.sha256


def test_training_from_the_cache_is_training_from_memory(
    bert: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, words = sections(bert, files), ("train.epochs=1",)
    fit(changed(raw, *words), tmp_path / "plain")
    fit(changed(raw, *words, f"data.cache={tmp_path / 'cache'}"), tmp_path / "first")
    monkeypatch.setattr(SequenceClassification, "encode", lambda *_: pytest.fail("encoded twice"))
    fit(changed(raw, *words, f"data.cache={tmp_path / 'cache'}"), tmp_path / "second")
    assert weights(tmp_path / "first") == weights(tmp_path / "second") == weights(tmp_path / "plain")
    assert len(list((tmp_path / "cache").iterdir())) == 2  # of train and validation


def test_damaged_cache_is_told(tmp_path: Path) -> None:
    write_items(tmp_path, [[[{"input_ids": [1, 2, 3]}]]])
    with (tmp_path / "input_ids.i4.values").open("ab") as file:
        np.zeros(1, "<i4").tofile(file)
    with pytest.raises(DataError, match="damaged: a file has another size than was written; delete it"):
        CachedItems(tmp_path)


def test_cache_keeps_its_bound_and_leaves_others_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["0" * 64, "1" * 64, "2" * 64, "products"]
    for i, name in enumerate(names):
        (tmp_path / name).mkdir()
        write_items(tmp_path / name, [[[{"input_ids": [i] * 100}]]])
        os.utime(tmp_path / name / FACTS, (i % 3, i % 3))
    size = sum(path.stat().st_size for path in (tmp_path / names[0]).iterdir())
    monkeypatch.setattr(encode, "MOST_BYTES", 2 * size)
    encode._prune(tmp_path, tmp_path / names[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == [names[0], *names[2:]]
