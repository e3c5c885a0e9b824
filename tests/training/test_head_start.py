"""The linear probe against scikit-learn's, and runs that begin at it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from lorakit.models import load_base
from lorakit.tasks.base import inputs_of
from lorakit.training.head_start import SHRINK, STRENGTH, States, probe
from lorakit.training.prepare import prepare
from lorakit.training.run import Run, fit_all
from tests.runs import SIZES, Stopped, changed, fit, resumed, save_bert, sections, start, stop_after, weights

PROBED = "train.head_start=probe"


def test_probe_is_the_logistic_regression_of_scikit_learn(sentence_bert: Path, files: Path) -> None:
    prepared = prepare(changed(sections(sentence_bert, files), "model.pooling=mean", "train.head_start=random"))
    base = load_base(str(sentence_bert), "sequence_classification", labels=prepared.labels, pooling="mean", dropout=0)
    head, items = base.new_head(), prepared.parts["train"].flat
    assert head is not None
    found = probe(base.model, head, prepared.task, items)

    states: list[torch.Tensor] = []
    head.register_forward_pre_hook(lambda module, args: states.append(args[0]))
    with torch.inference_mode():
        for item in items:
            base.model.eval()(**inputs_of(prepared.task.collate([item])))
    x = torch.cat(states).numpy()
    centred = x - x.mean(0)
    size = np.sqrt(np.square(centred).sum(1).mean())
    y = [item["labels"][0] if isinstance(item["labels"], list) else item["labels"] for item in items]
    # of two labels theirs has one row; ours has two, each half of it, so its penalty is half as much
    oracle = LogisticRegression(C=2 * STRENGTH, tol=1e-8, max_iter=10_000).fit(centred / size, y)
    ours = (torch.tensor(x) @ found["weight"].T + found["bias"]) / SHRINK
    np.testing.assert_allclose(ours[:, 1] - ours[:, 0], oracle.decision_function(centred / size), atol=2e-2)


@pytest.mark.parametrize(
    "task",
    [
        "sequence_classification",
        "multi_label_classification",
        "ordinal_classification",
        "sequence_regression",
        "token_classification",
        "task.crf=true",
    ],
)
def test_probe_is_scored_before_the_first_step_and_beats_a_random_head(
    bert: Path, files: Path, tmp_path: Path, task: str
) -> None:
    words = ("model.dropout=0", "lora.dropout=0", *([task] if "=" in task else []))
    raw = sections(bert, files, "token_classification" if "=" in task else task)
    losses = {}
    for word in (PROBED, "train.head_start=random"):
        run = start(changed(raw, *words, word, "train.lr=1e-9", "train.epochs=1"), tmp_path / word)
        result = run.fit()
        lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
        losses[word] = np.mean([line["loss"] for line in lines if "loss" in line])
        first = next(line for line in lines if "validation" in line)
        is_probed = word == PROBED
        assert (first["step"] == 0) is is_probed
        metric = result.scores["metric"]
        assert result.scores["linear_probe"] == (first["validation"].get(metric) if is_probed else None)
    assert losses[PROBED] < losses["train.head_start=random"]


def test_probe_does_not_tell_apart_what_dropout_hides(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIZES, "initializer_range", 0.02)
    raw = sections(save_bert(tmp_path / "flat"), files, "sequence_regression")
    result = fit(changed(raw, PROBED, "train.lr=1e-9", "train.epochs=1"), tmp_path / "run")
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert max(line["loss"] for line in lines if "loss" in line) < 10  # of targets with variance 1


def test_run_from_a_probe_resumes_to_the_bit_and_is_the_same_beside_another(
    bert: Path, files: Path, tmp_path: Path
) -> None:
    still = ("model.dropout=0", "lora.dropout=0", PROBED, "train.epochs=1")
    recipes = [changed(sections(bert, files), *still, f"train.lr={lr}") for lr in (1e-3, 2e-3)]
    whole = fit(recipes[0], tmp_path / "whole").folder
    with pytest.raises(Stopped):
        fit(
            changed(sections(bert, files), *still, "train.lr=1e-3", "train.checkpoint_every=2"),
            tmp_path / "cut",
            stop_after(3),
        )
    resumed(changed(sections(bert, files), *still, "train.lr=1e-3", "train.checkpoint_every=2"), tmp_path / "cut").fit()
    assert weights(tmp_path / "cut") == weights(whole)

    from lorakit.training.joint import prepare_all

    runs = []
    for i, member in enumerate(prepare_all(recipes)):
        (tmp_path / str(i)).mkdir()
        runs.append(Run(member, tmp_path / str(i)))  # type: ignore[arg-type]
    fit_all(runs)
    for name, alone in (("0", whole), ("1", fit(recipes[1], tmp_path / "alone").folder)):
        assert json.loads((tmp_path / name / "scores.json").read_text())["linear_probe"] == pytest.approx(
            json.loads((alone / "scores.json").read_text())["linear_probe"]
        )


def test_states_are_read_once_a_text_and_without_padding(bert: Path, files: Path) -> None:
    prepared = prepare(changed(sections(bert, files, "token_classification"), "train.head_start=random"))
    outputs = prepared.task.info.outputs(prepared.labels)
    base = load_base(str(bert), "token_classification", labels=outputs, dropout=0)
    head, items, known = base.new_head(), prepared.parts["train"].flat, States()
    assert head is not None
    found = probe(base.model, head, prepared.task, items, known)
    read: list[torch.Tensor] = []
    head.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    again = probe(base.model, head, prepared.task, items, known)
    torch.testing.assert_close(again, found, atol=0, rtol=0)
    assert not read  # no text went through the model again
    with torch.inference_mode():
        for item in items:
            base.model.eval()(**inputs_of(prepared.task.collate([item])))
            torch.testing.assert_close(known[(*item["input_ids"], *item.get("token_type_ids", ()))], read.pop()[0])
