"""Exports that sentence-transformers loads: equal vectors, merged and as an adapter over its base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from sentence_transformers import SentenceTransformer

import lorakit
from lorakit.app.commands.export import export_run
from lorakit.app.commands.import_ import import_adapter
from lorakit.models import load_base
from tests.related import recipe
from tests.runs import fit

TEXTS = ["the film was superb", "a rather stale plot", "moving", "superb " * 30]
KINDS: dict[str, Sequence[str]] = {
    "the base's own": (),
    "otherwise": ("task.normalize=false", "model.pooling=cls", "task.query_prompt='the '", "task.document_prompt='a '"),
    "full": ("train.method=full", "train.lr=1e-3"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_folder_gives_the_same_vectors(kind: str, tables: Path, encoder: Path, tmp_path: Path) -> None:
    run = fit(recipe(encoder, tables / "pairs.csv", *KINDS[kind]), tmp_path / "run").folder
    predictor = lorakit.load(run)
    vectors, queries = predictor.embed(TEXTS), predictor.embed(TEXTS, query=True)
    base = SentenceTransformer(str(encoder), device="cpu").encode(TEXTS)
    assert np.abs(base - vectors).max() > 1e-3  # it has learned something
    readers = ["sentence-transformers"] if kind == "full" else ["sentence-transformers", "peft"]
    for reader in readers:
        lines = export_run(run, reader, out := tmp_path / reader).lines
        assert any("SentenceTransformer" in line for line in lines)
        theirs = SentenceTransformer(str(out), device="cpu")
        np.testing.assert_allclose(theirs.encode(TEXTS), vectors, atol=1e-5)
        np.testing.assert_allclose(
            theirs.encode(TEXTS, prompt_name="query" if kind == "otherwise" else None), queries, atol=1e-5
        )
    if kind == "the base's own":  # as the model card has it
        theirs = SentenceTransformer(str(encoder), device="cpu")
        theirs.load_adapter(str(run / "adapter"))
        np.testing.assert_allclose(theirs.encode(TEXTS), vectors, atol=1e-5)
    again = load_base(str(tmp_path / "sentence-transformers"), "embedding", pooling="auto")  # as a base to train from
    assert (again.pooling, again.missing, again.max_length) == (predictor.side.pooling, (), 12)
    assert again.layout.normalize is bool(predictor.side.task.normalize)


def test_adapter_trained_by_sentence_transformers_is_imported(encoder: Path, tmp_path: Path) -> None:
    theirs = SentenceTransformer(str(encoder), device="cpu")
    peft_config = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION")
    try:
        theirs.add_adapter(peft_config)
    except ValueError as err:  # transformers 5.24 wants peft 0.22, which has not been published
        if "PEFT you are using is not compatible" not in str(err):
            raise
        pytest.skip(str(err))
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    theirs[0].auto_model.save_pretrained(tmp_path / "theirs")
    lines = import_adapter(tmp_path / "theirs", tmp_path / "ours", task="embedding", base=str(encoder))
    assert any("task: embedding" in line for line in lines)
    np.testing.assert_allclose(lorakit.load(tmp_path / "ours").embed(TEXTS), theirs.encode(TEXTS), atol=1e-5)
