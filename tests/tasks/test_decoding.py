"""Greedy decoding equals transformers' own, and a restricted output layer answers as the whole one does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tiny import items_of, tiny_t5
from transformers import LogitsProcessor, PreTrainedModel

from lorakit.data.example import of_words
from lorakit.lora import LoraConfig, add_adapter
from lorakit.tasks.text2text.decoding import Decoder, allowed, greedy
from lorakit.tasks.text2text.formats import FORMATS
from lorakit.tasks.text2text.ner import Text2TextNer

LIMIT = 40
EXAMPLES = [of_words(words.split()) for words in ("Anna met Bo in Port Louis .", "No one", "Ada", "so it goes on | on")]


class Within(LogitsProcessor):
    """The constraint by transformers' own interface, over the logits of the whole vocabulary."""

    def __init__(self, languages: Any) -> None:
        self.languages, self.paths = languages, None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.paths is None:
            self.paths = [language.begin() for language in self.languages]
        else:
            last = input_ids[:, -1].tolist()
            steps = zip(self.languages, self.paths, last, strict=True)
            self.paths = [language.step(paths, token) for language, paths, token in steps]
        kept = torch.full_like(scores, -torch.inf)
        for row, paths in enumerate(self.paths):
            tokens = sorted(allowed(paths)) or [0]
            kept[row, tokens] = scores[row, tokens]
        return kept


def generated(
    model: Any, batch: dict[str, torch.Tensor], eos: int, languages: Any = None
) -> list[tuple[tuple[int, ...], bool, float]]:
    """What transformers writes: tokens up to the end, and the mean probability of each."""
    out = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=LIMIT,
        do_sample=False,
        num_beams=1,
        logits_processor=[Within(languages)] if languages else [],
        return_dict_in_generate=True,
        output_scores=True,
    )
    log_p = torch.stack([step.log_softmax(-1).amax(-1) for step in out.scores], 1)
    rows = []
    for ids, values in zip(out.sequences[:, 1:].tolist(), log_p, strict=True):
        n = ids.index(eos) + 1 if eos in ids else len(ids)
        rows.append((tuple(ids[:n]), eos in ids, values[:n].mean().exp().item()))
    return rows


def make(tokenizer: Any, name: str, **config: Any) -> tuple[Text2TextNer, PreTrainedModel, dict[str, torch.Tensor]]:
    task = Text2TextNer(tokenizer, ("LOC", "PER"), 400, max_target_length=LIMIT, constrained=True, format=name)
    return task, tiny_t5(vocab_size=len(tokenizer), **config), task.collate(items_of(task, EXAMPLES))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("name", [None, *FORMATS])
@torch.no_grad()
def test_greedy_writes_what_transformers_writes(byte_tokenizer, name, tie):
    task, model, batch = make(byte_tokenizer, name or "list", tie_word_embeddings=tie)
    languages = [task.language(row) for row in batch["source"].tolist()] if name else None
    found = greedy(model, batch, LIMIT, languages)
    wanted = generated(model, batch, byte_tokenizer.eos_token_id, languages)
    assert [(row.ids, row.ended) for row in found] == [(ids, ended) for ids, ended, _ in wanted]
    assert [row.score for row in found] == pytest.approx([score for _, _, score in wanted], rel=1e-4)
    assert not name or any(row.ended for row in found)


@pytest.mark.parametrize("kind", ["plain", "adapted", "lm_head adapted"])
@torch.no_grad()
def test_restricted_output_layer_gives_the_rows_of_the_whole_one(byte_tokenizer, kind, monkeypatch):
    _, model, batch = make(byte_tokenizer, "list", tie_word_embeddings=False)
    if kind != "plain":
        add_adapter(model, LoraConfig(target_modules=("q", "lm_head") if "head" in kind else ("q",), r=2))
    rows = torch.tensor([1, 5, 77, 383])
    start = torch.zeros(len(EXAMPLES), 1, dtype=torch.long)
    whole = Decoder(model, batch).logits(start, None)[:, rows]
    decoder = Decoder(model, batch)
    assert decoder._has_bare_head() == ("head" not in kind)
    torch.testing.assert_close(decoder.logits(start, rows), whole)


@torch.no_grad()
def test_rows_of_a_batch_do_not_depend_on_each_other(byte_tokenizer):
    task, model, batch = make(byte_tokenizer, "tanl")
    together = task.predict(model, batch)
    alone = [task.predict(model, task.collate([item]))[0] for item in items_of(task, EXAMPLES)]
    assert [row.ids for row in together] == [row.ids for row in alone]


def test_greedy_goes_on_with_the_rows_that_have_not_ended(byte_tokenizer, monkeypatch):
    seen = []
    step = Decoder.step
    monkeypatch.setattr(
        Decoder, "step", lambda self, tokens, some: seen.append(len(tokens)) or step(self, tokens, some)
    )
    task, model, batch = make(byte_tokenizer, "list")
    written = greedy(model, batch, LIMIT, [task.language(row) for row in batch["source"].tolist()])
    assert seen == [sum(len(row.ids) > i for row in written) for i in range(len(seen))]
    assert len(set(seen)) > 1
