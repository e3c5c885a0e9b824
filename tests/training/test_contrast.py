"""The start of an adapter by pairs of texts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from lorakit.errors import ConfigError
from lorakit.lora import routed
from lorakit.lora.inits import named_generator
from lorakit.training import head_start
from lorakit.training.budget import CONTRAST as MOST
from lorakit.training.budget import CONTRAST_TWO, choose_head_start
from lorakit.training.checkpoint import newest_checkpoint
from lorakit.training.head_start import balanced, warm_up
from lorakit.training.joint import prepare_all
from lorakit.training.prepare import Prepared
from tests.runs import changed, fit, sections, taken_up

CONTRAST = "train.head_start=contrast"


def test_batches_have_pairs_of_as_many_labels_as_fit() -> None:
    for classes, each in ((2, 8), (4, 4), (77, 2)):
        labels = torch.arange(classes).repeat(9)
        rows = balanced(labels, named_generator(0, "a"))
        assert labels[rows].bincount(minlength=classes).tolist().count(each) == min(classes, 8)
        assert len(rows.unique()) == len(rows) == 16
        assert rows.tolist() != balanced(labels, named_generator(0, "b")).tolist()
    assert sorted(balanced(torch.tensor([0, 1, 1]), named_generator(0, "a")).tolist()) == [0, 1, 2]


def test_draws_texts_of_a_label_together_and_leaves_the_base_and_other_adapters(
    sentence_bert: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_start, "LR", 1e-2)  # for a model whose states hardly differ
    monkeypatch.setattr(head_start, "STEPS_PER_LABEL", 10)
    raw = sections(sentence_bert, files)
    recipes = [
        changed(raw, "model.pooling=mean", "model.dropout=0", "lora.dropout=0", CONTRAST, f"train.seed={i}")
        for i in (0, 1)
    ]
    prepared, other = (each for each in prepare_all(recipes) if isinstance(each, Prepared))
    assert prepared.contrasts
    model, before = prepared.model, {name: p.detach().clone() for name, p in prepared.model.named_parameters()}
    apart = [spread(prepared)]
    warm_up(prepared)
    apart.append(spread(prepared))
    assert apart[1] > apart[0] + 0.2
    for name, parameter in model.named_parameters():
        is_own = ".adapters.default." in name
        assert is_own or torch.equal(parameter, before[name])
    assert other.adapter != prepared.adapter


def spread(prepared: Prepared) -> float:
    """How much nearer texts of one label are to each other than texts of two, as a difference of mean cosines."""
    items = prepared.parts["train"].flat
    batch = prepared.task.collate(items)
    states: list[torch.Tensor] = []
    last = [
        module
        for module in prepared.model.modules()
        if isinstance(module, torch.nn.Linear) and module.out_features == 2
    ]
    hooks = [module.register_forward_pre_hook(lambda m, args: states.append(args[0])) for module in last]
    with torch.no_grad(), routed(prepared.model, [(prepared.adapter, 0)]):
        prepared.task.losses(prepared.model.eval(), batch)
    for hook in hooks:
        hook.remove()
    unit = F.normalize(states[0].float(), dim=1)
    labels = torch.tensor([item["labels"][0] for item in items])
    same, cosines = labels[:, None] == labels, unit @ unit.T
    return float(cosines[same].mean() - cosines[~same].mean())


def test_resumed_run_equals_the_one_that_never_stopped_and_its_baseline_is_the_frozen_probe(
    bert: Path, files: Path, tmp_path: Path
) -> None:
    raw = sections(bert, files)
    del raw["data"]["validation"]
    recipe = changed(raw, CONTRAST, "data.folds=2", "train.max_steps=4", "train.checkpoint_every=2")
    whole = fit(recipe, tmp_path / "whole")
    again = taken_up(recipe, tmp_path / "stopped", 3).fit()
    tensors = [newest_checkpoint(run.folder / "checkpoints")[0].tensors for run in (whole, again)]
    torch.testing.assert_close(*tensors, atol=0, rtol=0)
    probed = fit(changed(raw, "train.head_start=probe", "data.folds=2", "train.max_steps=1"), tmp_path / "probed")
    assert whole.scores["linear_probe"] == probed.scores["linear_probe"]


def test_is_chosen_for_few_examples_of_one_label_each(bert: Path, files: Path) -> None:
    raw = sections(bert, files)
    items = [{"labels": [i % 2]} for i in range(CONTRAST_TWO)]
    assert choose_head_start(changed(raw, "train.head_start=auto"), items) == "contrast"
    assert choose_head_start(changed(raw, "train.head_start=auto"), [*items, items[0]]) == "probe"
    three = [{"labels": [i % 3]} for i in range(MOST)]
    assert choose_head_start(changed(raw, "train.head_start=auto"), three) == "contrast"
    assert choose_head_start(changed(raw, "train.head_start=auto"), [*three, three[0]]) == "probe"
    assert choose_head_start(changed(raw, "train.head_start=auto"), [*items[1:], {"labels": [0.5, 0.5]}]) == "probe"
    assert choose_head_start(changed(raw, "train.head_start=auto", "train.method=head"), items) == "probe"
    assert choose_head_start(changed(raw, "train.head_start=random"), items) == "random"
    with pytest.raises(ConfigError, match="one label each, not shares"):
        choose_head_start(changed(raw, CONTRAST), [{"labels": [0.5, 0.5]}])
    for word in ("train.method=head", "task.name=sequence_regression"):
        with pytest.raises(ConfigError, match=r"train\.head_start = 'contrast' .*needs train\.method = 'lora'"):
            changed(raw, CONTRAST, word)
