"""Data sets of the library `datasets`, saved in folders or (the loading replaced) on the hub."""

from __future__ import annotations

import re
import sys

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from tests.data.documents import refusal

from lorakit.data.example import Dataset as Read
from lorakit.data.read import read
from lorakit.data.streaming import Streamed
from lorakit.errors import DataError

SENTIMENT = ClassLabel(names=["negative", "positive"])
TAGS = ClassLabel(names=["O", "B-PER", "I-PER"])
GLUE = Dataset.from_dict(
    {"sentence": ["a fine film", "dull", "NA"], "label": [1, 0, 1], "idx": [0, 1, 2]},
    Features({"sentence": Value("string"), "label": SENTIMENT, "idx": Value("int32")}),
)
UNLABELLED = Dataset.from_dict({"sentence": ["a"], "label": [-1], "idx": [0]}, GLUE.features)


def tagged(tags: list[int | None]) -> Dataset:
    """One sentence in the columns of CoNLL-2003, whose tags are class numbers."""
    words = ["Peter", "Blackburn", "spoke"]
    sequence = datasets.Sequence(TAGS)
    return Dataset.from_dict(
        {"tokens": [words], "ner_tags": [tags]},
        Features({"tokens": datasets.Sequence(Value("string")), "ner_tags": sequence}),
    )


CONLL = tagged([1, 2, 0])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None, str | None]]:
    """A hub of two data sets; gives the list of calls to `load_dataset`."""
    calls: list[tuple[str, str | None, str | None]] = []
    found = {
        "nyu-mll/glue": DatasetDict(train=GLUE, validation=GLUE.select([1]), test=UNLABELLED),
        "eriktks/conll2003": DatasetDict(train=CONLL),
    }

    def load_dataset(name: str, config: str | None = None, *, revision: str | None = None) -> DatasetDict:
        calls.append((name, config, revision))
        if name not in found:
            raise FileNotFoundError(f"{name} is not on the hub\nand much more text")
        return found[name]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def records(dataset: Read) -> list[tuple[str, object]]:
    return [(example.text, example.label) for example in dataset.examples]


def test_data_set_is_read_again_for_each_pass(hub, tmp_path):
    GLUE.save_to_disk(tmp_path / "saved")
    for source in ("nyu-mll/glue:sst2#train", str(tmp_path / "saved")):
        whole, again = read(source), read(source, again=True)
        assert isinstance(again.examples, Streamed)
        assert (list(again.examples), again.sha256) == (whole.examples, whole.sha256)
    with pytest.raises(DataError, match="not a label"):
        read("nyu-mll/glue#test", again=True)


def test_glue_is_read_by_its_notation_with_class_names(hub):
    source = "nyu-mll/glue:sst2#train"
    dataset = read(source)
    assert hub == [("nyu-mll/glue", "sst2", None)]
    assert records(dataset) == [("a fine film", "positive"), ("dull", "negative"), ("NA", "positive")]
    assert [example.where for example in dataset.examples] == [f"{source}:{row}" for row in (1, 2, 3)]
    assert dataset.notes == [f"{source}: text is column 'sentence'", f"{source}: label is column 'label'"]


def test_conll_2003_is_read_from_its_parquet_revision(hub):
    (example,) = read("eriktks/conll2003@refs/convert/parquet#train", "words").examples
    assert hub == [("eriktks/conll2003", None, "refs/convert/parquet")]
    assert (example.words, example.tags) == (("Peter", "Blackburn", "spoke"), ("B-PER", "I-PER", "O"))


def test_configuration_and_revision_may_stand_together(hub):
    read("nyu-mll/glue:sst2@main", split="validation")
    assert hub == [("nyu-mll/glue", "sst2", "main")]


@pytest.mark.parametrize(("source", "rows"), [("nyu-mll/glue:sst2", 1), ("nyu-mll/glue:sst2#train", 3)])
def test_named_split_beats_the_role_of_the_source(hub, source, rows):
    assert len(read(source, split="validation").examples) == rows


def test_unlabelled_split_is_refused_for_training(hub):
    source = "nyu-mll/glue:sst2#test"
    with pytest.raises(DataError, match=refusal(f"{source}:1", "column 'label' holds None, not a label")):
        read(source)


def test_unknown_split_is_refused_with_the_nearest_name(hub):
    source = "nyu-mll/glue:sst2#trian"
    with pytest.raises(DataError, match=refusal(source, "no split 'trian'; did you mean 'train'?")):
        read(source)


def test_unknown_id_is_refused_in_one_line(hub):
    message = "no such file, and the data set cannot be loaded from the hub: nobody/nothing is not on the hub"
    with pytest.raises(DataError, match=refusal("nobody/nothing", message) + "$"):
        read("nobody/nothing")


def test_missing_library_is_refused_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=re.escape("pip install 'lorakit[hub]'")):
        read("nyu-mll/glue:sst2")


@pytest.mark.parametrize("split", ["train", "test"])
def test_folder_of_one_saved_data_set_serves_every_role(tmp_path, split):
    GLUE.save_to_disk(tmp_path / "saved")
    dataset = read(str(tmp_path / "saved"), split=split)
    assert records(dataset) == [("a fine film", "positive"), ("dull", "negative"), ("NA", "positive")]


@pytest.mark.parametrize(("end", "split"), [("", "validation"), ("#validation", "train")])
def test_folder_of_saved_splits_gives_the_one_asked_for(tmp_path, end, split):
    DatasetDict(train=GLUE, validation=GLUE.select([1])).save_to_disk(tmp_path / "saved")
    assert records(read(f"{tmp_path / 'saved'}{end}", split=split)) == [("dull", "negative")]


def test_saved_tags_are_read_by_their_names(tmp_path):
    CONLL.save_to_disk(tmp_path / "saved")
    (example,) = read(str(tmp_path / "saved"), "words").examples
    assert example.tags == ("B-PER", "I-PER", "O")


@pytest.mark.parametrize("missing", [-1, None])
def test_missing_tag_of_a_word_is_refused_with_its_row(tmp_path, missing):
    tagged([1, missing, 0]).save_to_disk(tmp_path / "saved")
    path = tmp_path / "saved"
    with pytest.raises(DataError, match=refusal(f"{path}:1", "word 2 of column 'ner_tags' is None, not a text")):
        read(str(path), "words")


def test_fingerprint_of_saved_records_follows_their_content(tmp_path):
    other = DatasetDict(a=GLUE, b=GLUE.select([0, 1, 2]), c=GLUE.select([1, 0, 2]))
    other.save_to_disk(tmp_path / "saved")
    a, b, c = (read(f"{tmp_path / 'saved'}#{name}").sha256 for name in "abc")
    assert a == b != c


def test_folder_without_a_data_set_is_refused(tmp_path):
    with pytest.raises(DataError, match=refusal(tmp_path, "nothing in this folder can be read; expected ")):
        read(str(tmp_path))
