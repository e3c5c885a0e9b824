"""A reader from outside of the package: one function and one line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import lorakit
from lorakit import recipe
from lorakit.data import formats
from lorakit.data import read as reading
from lorakit.data.delimited import Row
from lorakit.data.example import Columns
from lorakit.errors import ConfigError
from lorakit.recipe import DataSection


def read_mood(path: Path, columns: Columns, notes: list[str]) -> Iterable[Row]:
    """Lines such as `good| what a film`."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        label, _, text = line.partition("|")
        yield Row({"text": text.strip(), "label": label}, f"{path}:{number}")


@pytest.fixture
def registered() -> Iterator[None]:
    lorakit.register_reader("mood", read_mood, ".mood")
    yield
    del formats.FORMATS["mood"], formats.ENDINGS[".mood"]
    recipe.FORMATS.remove("mood")


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(("name", "format"), [("x.mood", "auto"), ("x.txt", "mood")])
def test_reader_from_outside_is_chosen_by_ending_or_name(tmp_path: Path, name: str, format: str) -> None:
    (tmp_path / name).write_text("good| what a film\nbad|dull\n")
    found = reading.read(str(tmp_path / name), format=DataSection(format=format).format)
    assert [(e.text, e.label) for e in found.examples] == [("what a film", "good"), ("dull", "bad")]
    assert found.examples[1].where == f"{tmp_path / name}:2"


def test_names_and_endings_of_other_readers_are_refused() -> None:
    for words in (("csv", ".mood"), ("mood", ".csv")):
        with pytest.raises(ConfigError, match=r"^a reader of '\.?csv' is registered already$"):
            lorakit.register_reader(words[0], read_mood, words[1])
    with pytest.raises(ValueError, match="should be 'auto', 'csv'"):
        DataSection(format="mood")
