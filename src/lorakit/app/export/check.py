"""How an export proves itself: model and export answer the run's own texts side by side, logit by logit and answer by answer."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakit.data.example import Example
from lorakit.errors import LorakitError
from lorakit.inference.adapter_folder import ADAPTER, MODEL
from lorakit.inference.answer import answer_all, as_input, batches_of
from lorakit.inference.side import Side
from lorakit.recipe import read_recipe
from lorakit.tasks.base import Item, Task, inputs_of
from lorakit.tasks.metrics.bootstrap import Scores
from lorakit.tasks.text2text.decoding import Decoder
from lorakit.training.parts import read_parts

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
        return {
            "texts": len(self.texts.examples),
            "own_texts": self.texts.n_own,
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
        answers = run / "predictions.jsonl"
        lines = answers.read_text(encoding="utf-8").splitlines()[:OWN] if answers.is_file() else []
        read = map(json.loads, lines)
        return [Example(x["text"], None, x.get("pair"), choices=tuple(x.get("choices", ()))) for x in read], 0
    if "validation" not in parts:  # all examples were, in turns
        parts["validation"] = parts.pop("train")
    own = [example for name in ("validation", "test", "train") for example in parts.get(name, ())][:OWN]
    return own, min(len(own), len(parts["validation"]))


def _made_up(texts: Sequence[str], side: Side) -> list[Example]:
    """Texts from one word to more than fit, of the words of others."""
    chance = random.Random(0)
    words = [word for text in texts for word in text.split()]
    counts = [1, *(ceil(side.max_length * i / (MADE - 1)) for i in range(1, MADE))]
    made = [" ".join(chance.choices(words, k=count)) for count in counts]
    pair = None if side.columns.pair is None else made[0]
    choices = tuple(made[:2]) if side.task.info.wants == "choices" else ()
    return [Example(text, None, pair, choices=choices) for text in made]


def agree(task: Task, side: Side, texts: Texts, model: nn.Module, export: nn.Module) -> Agreement:
    """Ask the model and the export alike, in batches of all sizes, on the CPU."""
    examples = [bare(task, example) for example in texts.examples]
    items = task.encode(examples)
    difference = largest = torch.zeros(())
    with torch.inference_mode():
        before, after = (answer_all(each, task, examples, items, CPU) for each in (model, export))
        for one, other in _logits(task, [item for own in items for item in own], model, export):
            difference = torch.maximum(difference, (one - other).abs().max())  # NaN stays NaN
            largest = torch.maximum(largest, one.abs().max())
    near = NEAR * float(side.tuned.get("spread", 1.0))
    shown = [
        [_shown(task.to_json(e, a)) for e, a in zip(examples, answers, strict=True)] for answers in (before, after)
    ]
    gold = texts.examples[: texts.n_gold]
    scores = [task.evaluate(gold, answers[: len(gold)]).scores if gold else {} for answers in (before, after)]
    differing = sum(
        abs(one - other) > near if isinstance(one, float) else one != other for one, other in zip(*shown, strict=True)
    )
    return Agreement(texts, float(difference), float(largest), differing, *scores)


def _logits(task: Task, items: Sequence[Item], model: nn.Module, export: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """The logits of both, batch by batch; of a model that writes, at each step of its own output."""
    for rows in batches_of(model, task, items, CPU):
        batch = task.collate([items[i] for i in rows])
        inputs = inputs_of(batch)
        if task.info.model_kind == "text2text":
            decoders = [Decoder(each, batch) for each in (model, export)]
            written = [(decoders[0].start, *raw.ids) for raw in task.predict(model, batch)]
            for tokens in list(zip_longest(*written, fillvalue=decoders[0].eos))[:-1]:
                one, other = (decoder.logits(torch.tensor(tokens)[:, None], None) for decoder in decoders)
                yield one.float(), other.float()
            continue
        one, other = (each(**inputs).logits.float() for each in (model, export))
        real = inputs["attention_mask"].bool()  # what stands at padding is nobody's answer
        yield (one[real], other[real]) if one.ndim == 3 else (one, other)


def bare(task: Task, example: Example) -> Example:
    """The example as the task reads it, without what should be answered."""
    bare = replace(example, label=None, tags=())
    return bare if bare.words else as_input(task, bare)


def check_exact(agreement: Agreement) -> None:
    """Raise where an export is not what it should be: our own fault, which must not go out."""
    if not agreement.is_exact:
        raise RuntimeError(f"the export differs from the model; nothing was written. {agreement.line()}")


def _shown(line: dict[str, Any]) -> Any:
    """The answer without probabilities."""
    if "entities" in line and "generated" not in line:
        return [(entity["entity_group"], entity["start"], entity["end"]) for entity in line["entities"]]
    # two vectors are close or not, and have no answer apart from that
    return next((line[key] for key in ("generated", "labels", "label", "value", "score") if key in line), None)
