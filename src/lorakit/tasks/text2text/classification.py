"""A text, or a pair of texts, to one of several labels, which a T5 writes out: `classify: a fine film` -> `positive`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from lorakit.data.example import Example
from lorakit.errors import ConfigError
from lorakit.recipe import TaskSection
from lorakit.task_info import TASKS
from lorakit.tasks.base import Batch
from lorakit.tasks.metrics.bootstrap import Evaluation
from lorakit.tasks.metrics.labels import classification_scores, classification_statistics, mean
from lorakit.tasks.sequence import most_probable, texts_of
from lorakit.tasks.text2text.decoding import Decoder, WritingTask, decode, greedy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Named:
    """What was written: a label, or a text that is none; its probability, and that of each label where they are known."""

    text: str
    score: float
    probabilities: tuple[float, ...] = ()


@dataclass(frozen=True)
class Text2TextClassification(WritingTask):
    """Classification as generation.

    Constrained, the answer is the likeliest label, where the probability of a label is the product of its tokens', each
    among the tokens that lead on to some label; so they sum to one. Free, it is what greedy decoding writes, and may be
    no label at all.
    """

    info = TASKS["text2text_classification"]
    prefix: str = "classify: "
    constrained: bool = True

    @classmethod
    def make(
        cls, section: TaskSection, tokenizer: PreTrainedTokenizerBase, labels: tuple[str, ...], max_length: int
    ) -> Self:
        task = cls(tokenizer, labels, max_length, section.prefix, section.constrained)
        for label in labels:
            if (back := decode(tokenizer, tokenizer(label, add_special_tokens=False)["input_ids"])) != label:
                raise ConfigError(
                    f"task.name = 'text2text_classification': the tokenizer of this model decodes the label {label!r} "
                    f"as {back!r}; rename it in the data, or use sequence_classification"
                )
        return task

    @cached_property
    def written(self) -> list[list[int]]:
        """The tokens of each label, the end token last."""
        ids: list[list[int]] = self.tokenizer(text_target=list(self.labels))["input_ids"]
        return ids

    def target(self, example: Example) -> list[int]:
        return self.written[self.labels.index(self.expected(example))]

    def predict(self, model: nn.Module, batch: Batch) -> list[Named]:
        if self.constrained:
            rows = label_log_p(model, batch, self.written).exp().tolist()
            return [Named(self.labels[int(np.argmax(row))], max(row), tuple(row)) for row in rows]
        outputs = greedy(model, batch, max(map(len, self.written)))
        return [Named(decode(self.tokenizer, output.ids), output.score) for output in outputs]

    def answer(self, example: Example, raws: Sequence[Named]) -> Named:
        super().answer(example, [(raws[0].score, *raws[0].probabilities)])  # refuses what is not finite
        return raws[0]

    def evaluate(self, examples: Sequence[Example], answers: Sequence[Named]) -> Evaluation:
        """Scores of the labels, and `unknown`: the share of answers that are no label."""
        names = [self.expected(example) for example in examples], [answer.text for answer in answers]
        unknown = np.array([float(answer.text not in self.labels) for answer in answers])
        return Evaluation(
            {**classification_scores(*names, self.labels), "unknown": float(unknown.mean())},
            {**classification_statistics(*names, self.labels), "unknown": mean(unknown)},
        )

    def to_json(self, example: Example, answer: Named) -> dict[str, Any]:
        line = {
            **texts_of(example),
            "label": answer.text if answer.text in self.labels else None,
            "score": answer.score,
        }
        if self.constrained:
            return {**line, "probabilities": dict(zip(self.labels, answer.probabilities, strict=True))}
        return {**line, "generated": answer.text}

    def expected(self, example: Example) -> str:
        return most_probable(example, self.labels)


@torch.no_grad()
def label_log_p(model: nn.Module, batch: Batch, labels: Sequence[Sequence[int]]) -> Tensor:
    """The log-probability of each label among all of them, as paths through the trie of their tokens.

    The decoder is asked at the trie's branches alone: for two labels that differ in their first token, once. Shapes: (B, C).
    """
    trie: dict[tuple[int, ...], set[int]] = {}
    for label in labels:
        for i, token in enumerate(label):
            trie.setdefault(tuple(label[:i]), set()).add(token)
    decoder = Decoder(model, batch)
    log_p = torch.zeros(len(batch["input_ids"]), len(labels), device=batch["input_ids"].device)
    for prefix, tokens in trie.items():
        if len(tokens) > 1:
            following = sorted(tokens)
            branch = decoder.after(prefix, following)
            for c, label in enumerate(labels):
                if tuple(label[: len(prefix)]) == prefix:
                    log_p[:, c] += branch[:, following.index(label[len(prefix)])]
    return log_p
