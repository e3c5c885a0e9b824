"""A text to a text, in any task that is one: summaries, translations, answers to questions about a passage (the pair)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from lorakit.data.example import Example
from lorakit.recipe import TaskSection
from lorakit.task_info import TASKS
from lorakit.tasks.base import Batch, Cut, Item
from lorakit.tasks.metrics.bootstrap import Evaluation
from lorakit.tasks.metrics.texts import text_statistics
from lorakit.tasks.sequence import texts_of
from lorakit.tasks.text2text.decoding import Decoder, WritingTask, Written, greedy, target_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Text:
    """What was written, and its mean probability a token."""

    text: str
    score: float


@dataclass(frozen=True)
class Text2Text(WritingTask):
    """Generation as it is: the target is written token by token, greedily or by beam search."""

    info = TASKS["text2text_generation"]
    max_target_length: int = 128
    num_beams: int = 1
    length_penalty: float = 1.0

    @classmethod
    def make(
        cls, section: TaskSection, tokenizer: PreTrainedTokenizerBase, labels: tuple[str, ...], max_length: int
    ) -> Self:
        own = section.prefix, section.max_target_length, section.num_beams, section.length_penalty
        return cls(tokenizer, labels, max_length, *own)

    def encode(self, examples: Sequence[Example]) -> list[list[Item]]:
        encoded = super().encode(examples)
        if examples[0].target is None:
            return encoded
        targets = target_ids(self.tokenizer, [str(each.target) for each in examples], self.max_target_length)
        return [[{**item, "labels": ids}] for (item,), ids in zip(encoded, targets, strict=True)]

    def cut(self, examples: Sequence[Example], items: Sequence[Sequence[Item]]) -> Cut:
        ends = [item["labels"][-1] for (item,) in items if "labels" in item]
        return super().cut(examples, items)._replace(targets=sum(end != self.tokenizer.eos_token_id for end in ends))

    def predict(self, model: nn.Module, batch: Batch) -> list[Text]:
        if self.num_beams == 1:
            outputs = greedy(model, batch, self.max_target_length)
        else:
            outputs = beam_search(model, batch, self.max_target_length, self.num_beams, self.length_penalty)
        return [Text(self.tokenizer.decode(each.ids, skip_special_tokens=True).strip(), each.score) for each in outputs]

    def answer(self, example: Example, raws: Sequence[Text]) -> Text:
        super().answer(example, [raws[0].score])  # refuses what is not finite
        return raws[0]

    def evaluate(self, examples: Sequence[Example], answers: Sequence[Text]) -> Evaluation:
        statistics = text_statistics([self.expected(each) for each in examples], [each.text for each in answers])
        scores = {name: float(statistic.value(statistic.counts.sum(0))) for name, statistic in statistics.items()}
        return Evaluation(scores, statistics)

    def to_json(self, example: Example, answer: Text) -> dict[str, Any]:
        return {**texts_of(example), "generated": answer.text, "score": answer.score}

    def expected(self, example: Example) -> str:
        return str(example.target)


@torch.no_grad()
def beam_search(model: nn.Module, batch: Batch, limit: int, num_beams: int, length_penalty: float) -> list[Written]:
    """The best output by beam search for each row, of `limit` tokens at most, as transformers' `generate` finds it.

    An output's score is its log-probability / length ** length_penalty. A text is done when its best open beam, at its
    present length, scores no better than the worst of `num_beams` that have ended (early_stopping = False).
    """
    decoder = Decoder(model, batch)
    going = list(range(len(batch["input_ids"])))  # texts that are not done, in the decoder's order
    beams: list[list[tuple[float, tuple[int, ...]]]] = [[(0.0, ())] for _ in going]  # of each text, the best first
    ended: list[list[tuple[float, float, tuple[int, ...]]]] = [[] for _ in going]  # by score, the best first
    for length in range(1, limit + 1):
        last = [[ids[-1] if ids else decoder.start] for text in going for _, ids in beams[text]]
        # (rows, V)
        log_p = decoder.logits(torch.tensor(last, device=decoder.mask.device), None).float().log_softmax(-1)
        still: list[int] = []
        rows: list[int] = []  # that are gone on with
        first = 0  # row of the text's best beam
        for text in going:
            own = beams[text]
            sums = log_p[first : first + len(own)] + torch.tensor([p for p, _ in own], device=log_p.device)[:, None]
            best = sums.flatten().topk(min(2 * num_beams, sums.numel()))  # of them at most half end
            opened: list[tuple[float, tuple[int, ...]]] = []
            parents: list[int] = []
            for rank, (p, index) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
                beam, token = divmod(index, sums.shape[1])
                ids = (*own[beam][1], token)
                if token == decoder.eos or length == limit:
                    if rank < num_beams:
                        ended[text].append((p / length**length_penalty, p, ids))
                elif len(opened) < num_beams:
                    opened.append((p, ids))
                    parents.append(first + beam)
            ended[text] = sorted(ended[text], key=lambda each: -each[0])[:num_beams]
            first += len(own)
            is_full = len(ended[text]) == num_beams
            if opened and not (is_full and opened[0][0] / length**length_penalty <= ended[text][-1][0]):
                beams[text] = opened
                still.append(text)
                rows += parents
        if not still:
            break
        decoder.keep(rows)
        going = still
    best_of = [each[0] for each in ended]
    return [Written(ids, ids[-1] == decoder.eos, math.exp(p / len(ids))) for _, p, ids in best_of]
