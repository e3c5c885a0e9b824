"""The CRF against all paths of short sentences, finite differences, and the plain tagger that it starts as."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from tests.tiny import items_of
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lorakit.data.example import of_words
from lorakit.data.tags import odd_tags
from lorakit.errors import ConfigError
from lorakit.inference.answer import answer_all
from lorakit.recipe import TaskSection, make_recipe
from lorakit.task_info import tag_names
from lorakit.tasks.registry import task_layers
from lorakit.tasks.tag_decoding import (
    CRF,
    Crf,
    iob2_rule,
    iob2_start,
    log_likelihood,
    log_partition,
    marginals,
    path_score,
    viterbi,
)
from lorakit.tasks.token_classification import TokenClassification

LABELS = tag_names(["LOC", "PER"])
C = len(LABELS)
LENGTHS = (4, 1, 3, 2)
EXAMPLES = [
    of_words(["Peter", "visits", "EU", "Brussels"], ["B-PER", "O", "B-LOC", "I-LOC"]),
    of_words(["EU"], ["B-LOC"]),
    of_words(["the", "film", "Peter", "Blackburn", "the"], ["O", "O", "B-PER", "I-PER", "O"]),
]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def field() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random emissions, transitions, tags and the mask of sentences of different length."""
    rows, words = len(LENGTHS), max(LENGTHS)
    mask = torch.arange(words) < torch.tensor(LENGTHS)[:, None]
    tags = torch.randint(C, (rows, words), generator=torch.Generator().manual_seed(3))
    return 2 * draw(rows, words, C), 2 * draw(rows, C, C, seed=1), tags, mask


def score_by_hand(emissions: torch.Tensor, transitions: torch.Tensor, path: Sequence[int]) -> Any:
    return sum(emissions[i, tag] for i, tag in enumerate(path)) + sum(transitions[a, b] for a, b in pairwise(path))


def test_partition_is_the_sum_over_all_paths(field):
    emissions, transitions, tags, mask = field
    found = log_partition(emissions, transitions, mask)
    scores = path_score(emissions, transitions, tags, mask)
    for row, length in enumerate(LENGTHS):
        every = [
            score_by_hand(emissions[row], transitions[row], path).item() for path in product(range(C), repeat=length)
        ]
        torch.testing.assert_close(found[row], torch.tensor(every, dtype=torch.float64).logsumexp(0))
        wanted = score_by_hand(emissions[row], transitions[row], tags[row, :length].tolist())
        torch.testing.assert_close(scores[row], wanted)


def test_marginals_are_the_shares_of_paths_and_the_gradient_of_the_partition(field):
    emissions, transitions, _, mask = field
    found = marginals(emissions, transitions, mask)
    for row, length in enumerate(LENGTHS):
        shares = torch.zeros(length, C, dtype=torch.float64)
        for path in product(range(C), repeat=length):
            shares[range(length), path] += score_by_hand(emissions[row], transitions[row], path).exp()
        torch.testing.assert_close(found[row, :length], shares / shares[0].sum())
    (gradient,) = torch.autograd.grad(log_partition(emissions.requires_grad_(), transitions, mask).sum(), emissions)
    torch.testing.assert_close(found[mask].detach(), gradient[mask])


def test_padding_changes_nothing(field):
    emissions, transitions, tags, mask = field
    found = log_likelihood(emissions, transitions, tags, mask)
    noisy = torch.where(mask[..., None], emissions, 1e6)
    torch.testing.assert_close(log_likelihood(noisy, transitions, tags.where(mask, C - 1), mask), found)


def test_sentence_without_words_is_certain(field):
    emissions, transitions, tags, mask = field
    found = log_likelihood(emissions, transitions, tags, torch.zeros_like(mask))
    assert found.tolist() == [0.0] * len(LENGTHS)


# In the task


@pytest.fixture
def task(word_pieces: PreTrainedTokenizerFast) -> TokenClassification:
    return TokenClassification(word_pieces, LABELS, max_length=32, crf=True)


@pytest.fixture
def model(make_tagger: Callable[[int], PreTrainedModel]) -> PreTrainedModel:
    model = make_tagger(C)
    model.add_module(CRF, Crf(C))
    return model


def teach(model: torch.nn.Module) -> None:
    """Transitions as strong as the emissions."""
    with torch.no_grad():
        model.get_submodule(CRF).transitions.copy_(3 * draw(C, C, seed=5))


def test_untrained_crf_is_the_plain_tagger(task, model, word_pieces):
    plain = TokenClassification(word_pieces, LABELS, max_length=32)
    batch = task.collate(items_of(task, EXAMPLES))
    torch.testing.assert_close(task.losses(model, batch).sum(), plain.losses(model, batch).sum())
    assert batch["n_targets"].sum() == sum(len(example.words) for example in EXAMPLES)
    examples = [*EXAMPLES, of_words(["Peter", "\u200b", "EU"], ["B-PER", "O", "B-LOC"])]
    cpu = torch.device("cpu")
    for one, other in zip(
        *(answer_all(model, t, examples, t.encode(examples), cpu) for t in (task, plain)), strict=True
    ):
        assert one.tags == other.tags
        assert one.scores == pytest.approx(other.scores, rel=1e-5)


@torch.no_grad()
def test_loss_is_over_words_and_passes_over_those_without_a_piece(task, model):
    teach(model)
    table = model.get_submodule(CRF).transitions
    example = of_words(["\u200b", "Peter", "\u200b", "Blackburn", "the"], ["O", "B-PER", "O", "I-PER", "O"])
    batch = task.collate(items_of(task, [example, EXAMPLES[0]]))
    encoded = task.tokenizer(["Peter", "Blackburn", "the"], is_split_into_words=True, return_tensors="pt")
    log_p = model(**encoded).logits[0].log_softmax(-1)
    emissions = log_p[[encoded.word_ids(0).index(word) for word in range(3)]]
    every = [score_by_hand(emissions, table, path) for path in product(range(C), repeat=3)]
    gold = score_by_hand(emissions, table, [LABELS.index(tag) for tag in ("B-PER", "I-PER", "O")])
    alone = task.losses(model, task.collate(items_of(task, [EXAMPLES[0]]))).sum()
    torch.testing.assert_close(task.losses(model, batch).sum() - alone, torch.stack(every).logsumexp(0) - gold)


@torch.no_grad()
def test_answers_are_the_best_valid_paths(task, model):
    teach(model)
    table = model.get_submodule(CRF).transitions
    found = answer_all(model, task, EXAMPLES, task.encode(EXAMPLES), torch.device("cpu"))
    for example, answer in zip(EXAMPLES, found, strict=True):
        encoded = task.tokenizer(list(example.words), is_split_into_words=True, return_tensors="pt")
        log_p = model(**encoded).logits[0].log_softmax(-1)
        emissions = log_p[[encoded.word_ids(0).index(word) for word in range(len(example.words))]]
        paths = [p for p in product(range(C), repeat=len(emissions)) if not odd_tags([LABELS[i] for i in p], "IOB2")]
        best = max(paths, key=lambda path: score_by_hand(emissions, table, path).item())
        assert answer.tags == tuple(LABELS[i] for i in best)
        p = marginals(emissions[None], table[None], torch.ones(1, len(best), dtype=torch.bool))[0]
        assert answer.scores == pytest.approx(p[range(len(best)), best].tolist(), rel=1e-4)


def test_windows_train_the_paths_of_their_own_words(model, word_pieces):
    """With windows that share nothing, each is a sentence like any other."""
    teach(model)
    task = TokenClassification(word_pieces, LABELS, max_length=6, stride=0, crf=True)
    words, tags = ["Peter", "visits", "the", "EU"], ["B-PER", "O", "O", "B-LOC"]
    whole, parts = of_words(words * 2, tags * 2), [of_words(words, tags)] * 2
    with torch.no_grad():
        apart, together = (task.losses(model, task.collate(items_of(task, rows))).sum() for rows in ([whole], parts))
    torch.testing.assert_close(apart, together)


@pytest.mark.parametrize("other", ["decoding=argmax", "subwords=all"])
def test_crf_takes_paths_of_words_alone(other):
    raw = {"model": {"base": "minilm"}, "data": {"train": "a.conll"}, "task": {"name": "token_classification"}}
    with pytest.raises(ConfigError, match=r"task\.crf = true scores whole words"):
        make_recipe(raw, ["task.crf=true", f"task.{other}"])


def test_crf_is_a_layer_of_the_task():
    assert task_layers(TaskSection(name="token_classification"), LABELS) == {}
    layers = task_layers(TaskSection(name="token_classification", crf=True), LABELS)
    assert {name: module.transitions.shape for name, module in layers.items()} == {"crf": (C, C)}


# Viterbi, against all sequences of tags, and the rule of IOB2


def is_valid(sequence: Sequence[int]) -> bool:
    """As the reader of files sees it, which knows nothing of tables."""
    return not odd_tags([LABELS[i] for i in sequence], "IOB2")


def best_by_hand(emissions: torch.Tensor, transitions: torch.Tensor, constrained: bool) -> tuple[int, ...]:
    """The best of all sequences."""

    def total(sequence: Sequence[int]) -> Any:
        steps = pairwise(sequence)
        return sum(emissions[i, t] for i, t in enumerate(sequence)) + sum(transitions[a, b] for a, b in steps)

    every = product(range(C), repeat=len(emissions))
    return max((s for s in every if not constrained or is_valid(s)), key=total)


def padded(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random emissions of sentences of different length, noise in the padding, and the mask."""
    generator = torch.Generator().manual_seed(seed)
    emissions = 3 * torch.randn(len(LENGTHS), max(LENGTHS), C, generator=generator)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return emissions, mask


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("constrained", [True, False])
def test_viterbi_finds_the_best_of_all_sequences(seed, constrained):
    emissions, mask = padded(seed)
    transitions = torch.randn(len(LENGTHS), C, C, generator=torch.Generator().manual_seed(-seed - 1))
    given, table = emissions.clone(), transitions
    if constrained:
        given[:, 0] += iob2_start(LABELS)
        table = transitions + iob2_rule(LABELS)
    found = viterbi(given, table, mask)
    for row, length in enumerate(LENGTHS):
        wanted = best_by_hand(emissions[row, :length], transitions[row], constrained)
        assert tuple(found[row, :length].tolist()) == wanted


@pytest.mark.parametrize("seed", range(5))
def test_rule_makes_valid_iob2_of_anything_and_leaves_what_is_valid(seed):
    emissions = torch.randn(300, 5, C, generator=torch.Generator().manual_seed(seed))
    argmax = emissions.argmax(-1).tolist()
    begun = torch.cat([emissions[:, :1] + iob2_start(LABELS), emissions[:, 1:]], 1)
    found = viterbi(begun, iob2_rule(LABELS).expand(300, -1, -1), torch.ones(300, 5, dtype=torch.bool)).tolist()
    assert all(map(is_valid, found))
    assert 0 < sum(map(is_valid, argmax)) < len(argmax)
    assert all(best == row for best, row in zip(found, argmax, strict=True) if is_valid(row))


def test_rule_says_what_is_valid():
    pairs = {(i, j): iob2_rule(LABELS)[i, j] == 0 for i, j in product(range(C), repeat=2)}
    starts = [iob2_start(LABELS)[i] == 0 for i in range(C)]
    assert starts == [is_valid([i]) for i in range(C)]
    assert all(allowed == is_valid([i, j]) for (i, j), allowed in pairs.items() if starts[i])
    o, b, inside = (LABELS.index(tag) for tag in ("O", "B-PER", "I-PER"))
    assert [pairs[i, inside] for i in (o, b, inside)] == [False, True, True]


def test_labels_that_are_no_tags_are_not_ruled():
    assert (iob2_rule(["LABEL_0", "LABEL_1"]) == 0).all()
