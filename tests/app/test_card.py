"""The model card: what its header says is what the run scored, its Python answers as lorakit does, and no name breaks it."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import peft
import pytest
import tomli_w
import transformers
import yaml
from huggingface_hub import ModelCard

import lorakit
from lorakit.app.card import code, escaped, read_shipped, write_card
from lorakit.errors import OutputError
from tests.app.conftest import Cli
from tests.runs import scores_of

HOSTILE = (
    *("a|b", "`tick`", "``", "a\nb", "---", "x\n---\nlicense: mit", "<script>alert(1)</script>", "[x](javascript:y)"),
    *("{{ 7*7 }}", "{% raw %}", "# head", "\u202egnp.exe", "\0", "'\"\\", "- item: [1", "&lt;", "*b*", "é 漢 🎉"),
    *("```python", "!!python/object"),
)


@pytest.fixture
def run(bert_run: Path, tmp_path: Path) -> Path:
    """A copy of a run, to be written in."""
    shutil.copytree(bert_run, tmp_path / "run")
    return tmp_path / "run"


def test_header_holds_the_scores_with_their_intervals(run: Path) -> None:
    card = ModelCard.load(write_card(run))
    scores = scores_of(run)
    found = {result.metric_type: result for result in card.data.eval_results or []}
    assert {name: result.metric_value for name, result in found.items()} == {
        name: scores[name] for name in scores["intervals"]
    }
    for name, interval in scores["intervals"].items():
        assert found[name].metric_args == {"confidence_interval_95": interval}
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-classification")
    assert {result.dataset_name for result in found.values()} == {"validation.csv"}
    assert str(run.parent) not in str(card)  # nothing of where files lie here


OTHERS = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("multi_label_run", "regression_run", "ordinal_run", "t5_run")
]


@pytest.mark.parametrize("kind", ["bert_run", "tagger_run", *OTHERS])
def test_its_python_answers_without_lorakit(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(request.getfixturevalue(kind), run)
    side = json.loads((run / "adapter" / "lorakit.json").read_text())
    card = write_card(run).read_text()
    snippet = re.findall("```python\n(.*?)\n```", card, re.S)[1]
    snippet = (
        snippet.replace("max_new_tokens=128", "max_new_tokens=2")
        .replace('"FOLDER"', repr(str(run / "adapter")))
        .replace('"BASE"', repr(side["base"]["name"]))
    )
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(snippet.replace("A text.", "the film was superb"), found := {})
    assert isinstance(found["model"], peft.PeftModel)
    (answer,) = lorakit.load(run).predict(["the film was superb"])
    if kind == "bert_run":
        (printed,) = eval(out.getvalue())
        assert printed["label"] == answer["label"]
        assert printed["score"] == pytest.approx(answer["score"], abs=1e-5)
    if kind == "tagger_run":
        assert found["model"].config.id2label == dict(enumerate(side["labels"]))


def test_model_after_full_fine_tuning_is_called_by_transformers(run: Path) -> None:
    (run / "adapter").rename(run / "model")
    scores = scores_of(run)
    (run / "scores.json").write_text(json.dumps({**scores, "method": "full"}))
    card = ModelCard.load(write_card(run))
    assert card.data.library_name == "transformers"
    assert 'AutoModelForSequenceClassification.from_pretrained("FOLDER")' in str(card)
    assert "peft" not in card.text


@pytest.mark.parametrize("name", ["x\n---\nlicense: mit", "{{ 7*7 }}|`", "!!python/object: [<b>"])
def test_hostile_names_break_neither_header_nor_text(run: Path, name: str) -> None:
    side, scores = (json.loads((run / place).read_text()) for place in ("adapter/lorakit.json", "scores.json"))
    scores["per_class"] = {label: {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 1} for label in HOSTILE}
    (run / "adapter" / "lorakit.json").write_text(json.dumps({**side, "labels": HOSTILE, "data": {name: "0" * 64}}))
    (run / "scores.json").write_text(json.dumps(scores))
    (run / "predictions.jsonl").write_text(json.dumps({"text": name, "expected": HOSTILE[6], "label": name}) + "\n")
    (run / "recipe.toml").write_text(tomli_w.dumps({"data": {"validation": name}, "task": {"name": CLASSIFY}}))
    written = write_card(run).read_text(encoding="utf-8")
    _, header, body = re.split(r"(?m)^---\n", written, maxsplit=2)
    raw = yaml.safe_load(header)
    assert raw["model-index"][0]["results"][0]["dataset"]["split"] == "validation"
    assert "license" not in raw
    assert ModelCard(written).data.to_dict() == raw | {"model-index": raw["model-index"]}
    outside = re.sub(r"(?s)(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", body)  # what is not code
    assert not set(re.sub(r"\\.", "", outside)) & set("<[`")
    assert [line.split()[0] for line in outside.splitlines() if line.startswith("#")] == ["#", *["##"] * 6]
    for label in HOSTILE:
        assert f"| {code(label)} | 1.000 |" in body
        assert not set(code(label)) & set("\n\0\u202e")
    assert json.dumps(HOSTILE, ensure_ascii=False) in body


CLASSIFY = "sequence_classification"


def test_escaped_leaves_no_sign_of_markdown() -> None:
    assert not set(re.sub(r"\\.", "", escaped("".join(HOSTILE)))) & set("`*_[]<>|#")


def test_card_is_part_of_what_a_run_ships(bert_run: Path) -> None:
    assert (bert_run / "adapter" / "README.md").is_file()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        json.loads((bert_run / "adapter" / "lorakit.json").read_text())["base"]["name"]
    )
    peft.PeftModel.from_pretrained(model, bert_run / "adapter")


def test_verb_writes_it_again(cli: Cli, run: Path) -> None:
    place = run / "adapter" / "README.md"
    place.unlink()
    code, out, _ = cli("card", run, "--dry-run")
    assert (code, place.exists()) == (0, False)
    assert ModelCard(out).data.library_name == "peft"
    assert cli("card", run) == (0, f"card: {place}\n", "")
    assert json.loads(cli("card", run, "--json").out)["card"] == str(place)


def test_folder_without_side_file_has_no_card(run: Path) -> None:
    (run / "adapter" / "lorakit.json").unlink()
    with pytest.raises(OutputError, match=r"adapter/lorakit\.json: missing"):
        read_shipped(run)
