"""How an export proves itself: model and export answer the run's own texts side by side, logit by logit and answer by answer."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakit.data.example import Example
from lorakit.errors import LorakitError
from lorakit.inference.adapter_folder import ADAPTER, MODEL
from lorakit.inference.answer import answer_all, as_wanted
from lorakit.inference.side import Side
from lorakit.recipe import read_recipe
from lorakit.tasks.base import Task
from lorakit.tasks.metrics.bootstrap import Scores
from lorakit.training.prepare import read_parts

OWN = 1000  # texts of the run that are asked at most
MADE = 16  # texts made up beside them, of all lengths up to the limit
BOUND = 1e-4  # of the largest logit: what an exact export may differ by
NEAR = 0.01  # of the spread in training: numbers that differ by less are the same answer
PROBE = "The quick brown fox jumps over the lazy dog; Ada Lovelace met Charles Babbage in London in 1833!"
CPU = torch.device("cpu")


class Texts(NamedTuple):
    """What is asked: the run's own texts, and those made up behind them. The first `n_gold` have labels to score with."""

    examples: Sequence[Example]
    n_own: int
    n_gold: int

    def __str__(self) -> str:
        made = len(self.examples) - self.n_own
        return f"{len(self.examples):,} texts ({self.n_own:,} of the run's, {made} made up)"


class Agreement(NamedTuple):
    """How far an export's logits are from the model's at most, how many of its answers are others, and both scores."""

    texts: Texts
    logits: float
    largest_logit: float
    differing: int
    before: Scores
    after: Scores

    @property
    def is_exact(self) -> bool:
        """Whether the logits differ by no more than rounding."""
        return self.logits <= BOUND * self.largest_logit

    @property
    def same(self) -> float:
        """The share of answers that are the same."""
        return 1 - self.differing / len(self.texts.examples)

    def line(self) -> str:
        """All of it for people."""
        return (
            f"check: read back from the files, on {self.texts} logits differ by at most {self.logits:.2g} "
            f"(largest {self.largest_logit:.3g}), {self.differing or 'no'} answers differ"
        )

    def facts(self) -> dict[str, Any]:
        """All of it for programs."""
        counts = {"texts": len(self.texts.examples), "own_texts": self.texts.n_own}
        return counts | {
            "logits": self.logits,
            "largest_logit": self.largest_logit,
            "answers_differing": self.differing,
        }


def texts_of(path: Path, side: Side) -> Texts:
    """What to ask an export of this run or adapter: its data where they are still there, else what it has answered."""
    run = path.parent if path.name in (ADAPTER, MODEL) and not (path / "recipe.toml").is_file() else path
    own, n_gold = _own(run)
    made = _made_up([example.text for example in own] or [PROBE], side)
    return Texts([*own, *made], len(own), n_gold)


def _own(run: Path) -> tuple[list[Example], int]:
    """The first examples of validation, test and training, and how many of validation."""
    try:
        parts, _, _ = read_parts(read_recipe(run / "recipe.toml"))
    except (LorakitError, OSError):  # an adapter alone, or data that are elsewhere now
        return [_asked(line) for line in _lines(run / "predictions.jsonl")[:OWN]], 0
    own = [example for name in ("validation", "test", "train") for example in parts.get(name, ())][:OWN]
    return own, min(len(own), len(parts["validation"]))


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _asked(line: dict[str, Any]) -> Example:
    return Example(line["text"], None, line.get("pair"))


def _made_up(texts: Sequence[str], side: Side) -> list[Example]:
    """Texts from one word to more than fit, of the words of others."""
    chance = random.Random(0)
    words = [word for text in texts for word in text.split()]
    counts = [1, *(ceil(side.max_length * i / (MADE - 1)) for i in range(1, MADE))]
    made = [" ".join(chance.choices(words, k=count)) for count in counts]
    pair = None if side.columns.pair is None else made[0]
    return [Example(text, None, pair) for text in made]


def agree(task: Task, side: Side, texts: Texts, model: nn.Module, export: nn.Module) -> Agreement:
    """Ask the model and the export alike, in batches of all sizes, on the CPU.

    Logits are compared side by side, of a model that writes at each step of its own output; answers are what each gives
    by itself.
    """
    asked = [bare(task, example) for example in texts.examples]
    items = task.encode(asked)
    both = Beside(model, export)
    with torch.inference_mode():
        before = answer_all(both, task, asked, items, CPU)
        after = answer_all(export, task, asked, items, CPU)
    near = NEAR * float(side.tuned.get("spread", 1.0))
    shown = [[_shown(task.to_json(e, a)) for e, a in zip(asked, answers, strict=True)] for answers in (before, after)]
    gold = texts.examples[: texts.n_gold]
    scores = [task.evaluate(gold, answers[: len(gold)]).scores if gold else {} for answers in (before, after)]
    differing = sum(not _is_same(one, other, near) for one, other in zip(*shown, strict=True))
    return Agreement(texts, float(both.difference), float(both.largest), differing, *scores)


def bare(task: Task, example: Example) -> Example:
    """The example as the task reads it, without what should be answered."""
    bare = replace(example, label=None, tags=())
    return bare if bare.words else as_wanted(task, bare)


def check_exact(agreement: Agreement) -> None:
    """Raise where an export is not what it should be: our own fault, which must not go out."""
    if not agreement.is_exact:
        raise RuntimeError(f"the export differs from the model; nothing was written. {agreement.line()}")


def _shown(line: dict[str, Any]) -> Any:
    """The answer without probabilities."""
    if "entities" in line and "generated" not in line:
        return [(entity["entity_group"], entity["start"], entity["end"]) for entity in line["entities"]]
    return next(line[key] for key in ("generated", "labels", "label", "value") if key in line)


def _is_same(one: Any, other: Any, near: float) -> bool:
    return abs(one - other) <= near if isinstance(one, float) else bool(one == other)


class Caches(NamedTuple):
    """What two decoders keep of the tokens before."""

    one: Any
    other: Any

    def batch_select_indices(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        for cache in self:
            cache.batch_select_indices(rows)


class Beside(nn.Module):
    """Two models asked alike. It answers as the first one does, and keeps the largest difference of the logits."""

    def __init__(self, model: nn.Module, export: nn.Module) -> None:
        super().__init__()
        self.both = nn.ModuleList([model, export])
        self.config = model.config
        self.difference = self.largest = torch.zeros(())

    def get_submodule(self, target: str) -> nn.Module:
        """A layer of the first one's, which an export may lack: a CRF."""
        return self.both[0].get_submodule(target)

    def get_output_embeddings(self) -> None:
        """None that could be asked for some rows alone."""

    def get_encoder(self) -> Any:
        """Both encoders, whose answers go side by side into one tensor (B, T, 2 d)."""

        def encode(**inputs: Tensor) -> Any:
            each = [model.get_encoder()(**inputs).last_hidden_state for model in self.both]  # type: ignore[operator]
            return SimpleNamespace(last_hidden_state=torch.cat(each, dim=-1))

        return encode

    def forward(
        self, encoder_outputs: tuple[Tensor] | None = None, past_key_values: Caches | None = None, **inputs: Any
    ) -> Any:
        """The first one's logits. Shapes: (B, C), (B, T, C) or, of a decoder, (B, steps, V)."""
        own: list[dict[str, Any]] = [{}, {}]
        if encoder_outputs is not None:
            halves = encoder_outputs[0].chunk(2, dim=-1)
            caches = past_key_values or Caches(None, None)
            own = [{"encoder_outputs": (h,), "past_key_values": c} for h, c in zip(halves, caches, strict=True)]
        outs = [model(**inputs, **more) for model, more in zip(self.both, own, strict=True)]
        one, other = (out.logits.float() for out in outs)
        if encoder_outputs is None and one.ndim == 3:  # what stands at padding is nobody's answer
            real = inputs["attention_mask"].bool()
            one, other = one[real], other[real]
        self.difference = torch.maximum(self.difference, (one - other).abs().max())  # NaN stays NaN
        self.largest = torch.maximum(self.largest, one.abs().max())
        caches = Caches(*(getattr(out, "past_key_values", None) for out in outs))
        return SimpleNamespace(logits=outs[0].logits, past_key_values=caches)
