"""Text to text: beams as transformers' generate has them, scores as sacrebleu's and rouge-score's, a run to its report."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import CHRF
from tests.runs import Sections, changed, fit, reviews
from tests.tiny import tiny, tiny_batch
from transformers import PreTrainedModel

from lorakit.data.example import Example
from lorakit.data.read import read
from lorakit.errors import ConfigError, DataError
from lorakit.inference.predictor import load
from lorakit.tasks.metrics.texts import text_statistics
from lorakit.tasks.text2text.decoding import greedy
from lorakit.tasks.text2text.writing import beam_search
from lorakit.training.run_files import read_run

LIMIT = 12


def generated(model: Any, batch: dict[str, torch.Tensor], **how: Any) -> list[list[int]]:
    """What transformers writes, without start, padding and what follows an end."""
    found = model.generate(
        **batch, max_new_tokens=LIMIT, do_sample=False, forced_eos_token_id=None, forced_bos_token_id=None, **how
    )
    eos = model.config.eos_token_id
    rows = [row[1:].tolist() for row in found]
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


@pytest.mark.parametrize(
    ("architecture", "num_beams", "length_penalty"),
    [
        ("T5ForConditionalGeneration", 5, 0.0),
        ("T5ForConditionalGeneration", 2, 2.5),
        ("BartForConditionalGeneration", 2, 1.0),
        ("BartForConditionalGeneration", 3, -1.0),
    ],
)
def test_beams_are_those_of_generate(architecture: str, num_beams: int, length_penalty: float) -> None:
    n_ended = 0
    for seed in range(3):
        model: PreTrainedModel = tiny(architecture, seed=seed)
        with torch.no_grad():  # so that outputs end at all lengths
            model.get_output_embeddings().weight[model.config.eos_token_id] *= 3
        batch = {key: value for key, value in tiny_batch(model, seed=seed).items() if key != "labels"}
        how = {"num_beams": num_beams, "length_penalty": length_penalty, "early_stopping": False}
        ours = beam_search(model, batch, LIMIT, num_beams, length_penalty)
        theirs = generated(model, batch, **how)
        pad = model.config.pad_token_id
        assert [[i for i in each.ids if i != pad] for each in ours] == [[i for i in row if i != pad] for row in theirs]
        n_ended += sum(each.ended for each in ours)
        assert [each.ids[-1] == model.config.eos_token_id for each in ours] == [each.ended for each in ours]
    assert n_ended


@pytest.mark.slow
@torch.no_grad()
def test_beams_of_a_trained_t5_are_those_of_generate() -> None:
    from lorakit.models import load_base

    base = load_base("t5-demo", "text2text")
    encoded = base.tokenizer(["ner: Ada visited Oslo .", "ner: the film was stale"], return_tensors="pt", padding=True)
    batch = {key: encoded[key] for key in ("input_ids", "attention_mask")}
    for num_beams in (2, 4):
        ours = beam_search(base.model.eval(), batch, 40, num_beams, 1.0)
        theirs: Any = base.model.generate(**batch, max_new_tokens=40, num_beams=num_beams, do_sample=False)  # type: ignore[operator]
        assert [list(each.ids) for each in ours] == [
            row[1 : 1 + len(each.ids)].tolist() for row, each in zip(theirs, ours, strict=True)
        ]


def test_one_beam_is_greedy() -> None:
    model = tiny("T5ForConditionalGeneration")
    batch = {key: value for key, value in tiny_batch(model).items() if key != "labels"}
    one, plain = beam_search(model, batch, LIMIT, 1, 1.0), greedy(model, batch, LIMIT)
    assert [each.ids for each in one] == [each.ids for each in plain]
    assert [each.score for each in one] == pytest.approx([each.score for each in plain], rel=1e-5)


def test_row_is_searched_as_if_alone() -> None:
    model = tiny("T5ForConditionalGeneration", seed=1)
    batch = {key: value for key, value in tiny_batch(model).items() if key != "labels"}
    together = beam_search(model, batch, LIMIT, 3, 1.0)
    for i, row in enumerate(together):
        n = int(batch["attention_mask"][i].sum())
        (alone,) = beam_search(model, {key: value[i : i + 1, :n] for key, value in batch.items()}, LIMIT, 3, 1.0)
        assert alone.ids == row.ids


# Scores


def texts(seed: int, n: int = 40) -> tuple[list[str], list[str]]:
    """References and texts that share some of their words, empty ones and those of other scripts among them."""
    chance = random.Random(seed)
    words = ["the", "film", "films", "was", "not", "a", "über", "Straße", "电影", "it's", "good.", "2026", "U.S.", "  "]
    gold = [" ".join(chance.choices(words, k=chance.choice((1, 3, 8)))) for _ in range(n)]
    written = [" ".join(w for w in text.split(" ") if chance.random() < 0.7) for text in gold]
    return gold, [chance.choice((text, text, "the film", "")) for text in written]


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_those_of_sacrebleu_and_rouge_score(seed: int) -> None:
    gold, written = texts(seed)
    ours = {name: float(s.value(s.counts.sum(0))) for name, s in text_statistics(gold, written).items()}
    assert ours["chrf"] == pytest.approx(CHRF().corpus_score(written, [gold]).score / 100, abs=1e-12)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    theirs = [scorer.score(*pair) for pair in zip(gold, written, strict=True)]
    for name in ("rouge1", "rouge2", "rougeL"):
        mean = sum(each[name].fmeasure for each in theirs) / len(theirs)
        assert ours[f"rouge_{name[-1].lower()}"] == pytest.approx(mean, abs=1e-12)
    assert ours["exact_match"] == pytest.approx(sum(g == w for g, w in zip(gold, written, strict=True)) / len(gold))


@pytest.mark.parametrize("written", ["", "a", "the film was fresh"])
def test_scores_of_one_text_are_defined(written: str) -> None:
    for statistic in text_statistics(["the film was fresh"], [written]).values():
        assert 0 <= float(statistic.value(statistic.counts.sum(0))) <= 1


# Data and runs


@pytest.fixture
def summaries(tmp_path: Path) -> Path:
    for name, n, seed in (("train", 24, 1), ("validation", 6, 2)):
        rows = [{"document": text, "summary": f"{label} film"} for text, label in reviews(n, seed)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def recipe_of(base: Path, data: Path) -> Sections:
    return {
        "model": {"base": str(base), "dtype": "fp32"},
        "data": {"train": str(data / "train.jsonl"), "validation": str(data / "validation.jsonl")},
        "task": {"name": "text2text_generation", "prefix": "summarize: ", "max_target_length": 16},
        "lora": {"r": 4},
        "train": {"epochs": 1, "batch_size": 8, "lr": 2e-2},
    }


def test_targets_are_read_from_the_usual_column_or_a_named_one(summaries: Path, tmp_path: Path) -> None:
    dataset = read(str(summaries / "train.jsonl"), "target")
    assert {example.target for example in dataset.examples} == {"good film", "bad film"}
    assert dataset.examples[0].label is None
    assert any("target is column 'summary'" in note for note in dataset.notes)
    (tmp_path / "qa.csv").write_text("question,context,answer\nwho?,Ada came .,Ada\n")
    (example,) = read(str(tmp_path / "qa.csv"), "target").examples
    assert (example.text, example.target) == ("who?", "Ada")
    (tmp_path / "none.csv").write_text("text,other\na,b\n")
    with pytest.raises(DataError, match=r"which column is the target\? Set data\.label=NAME"):
        read(str(tmp_path / "none.csv"), "target")
    (tmp_path / "gap.csv").write_text("text,target\na,b\nc,\n")
    with pytest.raises(DataError, match=r"gap\.csv:3"):
        read(str(tmp_path / "gap.csv"), "target")


def test_run_is_scored_reported_and_answers_by_beams(t5: Path, summaries: Path, tmp_path: Path) -> None:
    from lorakit.app.report.page import write_report

    fit(changed(recipe_of(t5, summaries), "task.num_beams=3", "train.max_steps=2"), tmp_path / "run")
    run = read_run(tmp_path / "run")
    assert run.scores.metric == "chrf"
    assert set(run.scores.values) >= {"chrf", "rouge_1", "rouge_2", "rouge_l", "exact_match"}
    assert set(run.scores.intervals) >= {"chrf", "rouge_l"}
    write_report(tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "good film" in page
    assert "rouge" in page.lower()
    predictor = load(tmp_path / "run")
    (line,) = predictor.predict(["the film was stale"])
    assert set(line) >= {"text", "generated", "score"}
    assert predictor.task.num_beams == 3  # type: ignore[attr-defined]
    dataset = predictor.read_labelled(str(summaries / "validation.jsonl"))
    assert predictor.evaluate(dataset.examples)["chrf"] == pytest.approx(run.scores.values["chrf"])


@pytest.mark.slow
def test_what_is_taught_is_written(t5: Path, summaries: Path, tmp_path: Path) -> None:
    """A model that sees its targets often enough writes them, by beams too."""
    words = (
        "train.epochs=30",
        "train.lr=3e-2",
        "lora.r=16",
        "train.method=full",
        "task.num_beams=2",
        "train.eval_every=90",
    )
    fit(changed({**recipe_of(t5, summaries), "lora": {}}, *words), tmp_path / "run")
    assert read_run(tmp_path / "run").scores.values["rouge_l"] > 0.4


def test_texts_are_cut_and_counted(t5: Path) -> None:
    from lorakit.models import load_tokenizer
    from lorakit.recipe import TaskSection
    from lorakit.tasks.registry import make_task

    tokenizer, _ = load_tokenizer(str(t5), "text2text")
    task = make_task(TaskSection(name="text2text_generation", max_target_length=8), tokenizer, (), 16)
    examples = [Example("a " * 40, target="b " * 40), Example("a", target="b")]
    assert task.cut(examples, task.encode(examples))[:2] == (1, 1)


@pytest.mark.parametrize("key", ["num_beams=4", "length_penalty=2.0"])
def test_keys_of_writing_belong_to_no_other_task(t5: Path, summaries: Path, key: str) -> None:
    raw = recipe_of(t5, summaries)
    raw["task"] = {"name": "sequence_classification"}
    with pytest.raises(ConfigError, match="belongs to text2text_generation, not to sequence_classification"):
        changed(raw, f"task.{key}")
