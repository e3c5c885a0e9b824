"""Entities as text by a tiny T5 over bytes: targets, loss and greedy decoding against a plain loop."""

from __future__ import annotations

import json

import pytest
import torch
from tests.tiny import items_of

from lorakit.data.example import of_text, of_words
from lorakit.data.tags import Entity
from lorakit.tasks.base import IGNORE
from lorakit.tasks.entity_list import write
from lorakit.tasks.text2text_ner import Extracted, Generated, Text2TextNer

TYPES = ("LOC", "PER")
EXAMPLES = [
    of_words(["Peter", "spoke"], ["B-PER", "O"]),
    of_words(["no"], ["O"]),
    of_words(["Al", "met", "Bo", "and", "Al"], ["B-PER", "O", "B-PER", "O", "B-PER"]),
    of_words(["New", "York"], ["B-LOC", "I-LOC"]),
]
TARGETS = ["Peter: PER", "None", "Al: PER | Bo: PER | Al: PER", "New York: LOC"]
CUT = len("Al: PER")  # tokens of output, at which some answers of the trained model end and some do not


@pytest.fixture(scope="module")
def task(byte_tokenizer) -> Text2TextNer:
    return Text2TextNer(byte_tokenizer, TYPES, max_length=64, prefix="", max_target_length=32)


@pytest.fixture(scope="module")
def batch(task):
    return task.collate(items_of(task, EXAMPLES))


@pytest.fixture(scope="module")
def trained(task, batch, make_writer):
    """A model that a few steps on the task's own loss taught to write something like the targets."""
    model = make_writer()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        (task.loss(model, batch) / task.n_targets(batch)).backward()
        optimizer.step()
    return model.eval()


def said(text: str, example, ended: bool = True) -> Extracted:
    task = Text2TextNer(None, TYPES, max_length=64)
    return task.answer(example, [Generated(text, ended, score=0.5)])


@torch.no_grad()
def greedy(model, ids: list[int], limit: int) -> tuple[list[int], float]:
    """The output of one row and its mean log-probability, a step at a time, without `generate`."""
    config, log_ps = model.config, []
    output = [config.decoder_start_token_id]
    while len(output) <= limit and output[-1] != config.eos_token_id:
        logits = model(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([output])).logits[0, -1]
        log_p, token = logits.log_softmax(-1).max(-1)
        log_ps.append(log_p)
        output.append(token.item())
    return output[1:], torch.stack(log_ps).mean().item()


def test_targets_are_written_as_the_reference_system_does(task):
    assert [task.expected(example) for example in EXAMPLES] == TARGETS


def test_inputs_begin_with_the_prefix(byte_tokenizer):
    items = items_of(Text2TextNer(byte_tokenizer, TYPES, max_length=64), EXAMPLES)
    texts = [byte_tokenizer.decode(item["input_ids"], skip_special_tokens=True) for item in items]
    assert texts == [f"ner: {example.text}" for example in EXAMPLES]
    written = [byte_tokenizer.decode(item["labels"], skip_special_tokens=True) for item in items]
    assert written == TARGETS


def test_labels_are_ignored_where_padded_and_nowhere_else(task, batch):
    lengths = [len(item["labels"]) for item in items_of(task, EXAMPLES)]
    wanted = [[i >= length for i in range(max(lengths))] for length in lengths]
    assert (batch["labels"] == IGNORE).tolist() == wanted
    assert not (batch["labels"] == task.tokenizer.pad_token_id).any()
    assert task.n_targets(batch) == sum(lengths) == sum(len(target) + 1 for target in TARGETS)  # and an end token


def test_loss_is_that_of_transformers_times_the_targets(task, batch, make_writer):
    model = make_writer().eval()
    torch.testing.assert_close(task.loss(model, batch), model(**batch).loss * task.n_targets(batch))


def test_loss_of_a_batch_is_the_sum_of_its_rows(task, batch, make_writer):
    model = make_writer().eval()
    rows = [task.loss(model, task.collate([item])) for item in items_of(task, EXAMPLES)]
    torch.testing.assert_close(task.loss(model, batch), torch.stack(rows).sum())


@pytest.mark.parametrize("limit", [CUT, 32])
def test_answers_of_a_batch_equal_a_plain_loop_over_its_rows(task, byte_tokenizer, trained, limit):
    task = Text2TextNer(byte_tokenizer, TYPES, max_length=64, prefix="", max_target_length=limit)
    items = items_of(task, EXAMPLES)
    with torch.no_grad():
        found = task.predict(trained, task.collate(items))
    loops = [greedy(trained, item["input_ids"], limit) for item in items]
    assert [answer.text for answer in found] == [byte_tokenizer.decode(o, skip_special_tokens=True) for o, _ in loops]
    assert [answer.ended for answer in found] == [o[-1] == byte_tokenizer.eos_token_id for o, _ in loops]
    means = torch.tensor([mean for _, mean in loops]).exp().tolist()
    assert [answer.score for answer in found] == pytest.approx(means, rel=1e-3)
    if limit == CUT:
        assert {answer.ended for answer in found} == {True, False}


@torch.no_grad()
def test_training_on_the_loss_teaches_to_write_and_to_stop(task, batch, trained):
    none = TARGETS.index("None")
    answer = task.predict(trained, batch)[none]
    assert (answer.text, answer.ended) == ("None", True)


def test_perfect_outputs_score_one():
    answers = [said(target, example) for target, example in zip(TARGETS, EXAMPLES, strict=True)]
    scores = Text2TextNer(None, TYPES, max_length=64).score(EXAMPLES, answers)
    assert {name: scores[name] for name in ("entity_f1", "entity_f1_strict", "surface_f1")} == {
        "entity_f1": 1.0,
        "entity_f1_strict": 1.0,
        "surface_f1": 1.0,
    }
    assert {scores[name] for name in ("malformed", "unknown_type", "truncated", "invented")} == {0.0}


@pytest.mark.parametrize(
    ("output", "ended", "shares"),
    [
        ("Al: PER | Bo: PE", False, {"truncated": 1.0, "malformed": 1.0, "unknown_type": 1.0}),
        ("Al: PER | Bo", False, {"truncated": 1.0, "malformed": 1.0}),
        ("Al: PER | Bo", True, {"malformed": 1.0}),
        ("Al: PER | Eve: PER", True, {"invented": 1 / 2}),
        ("", True, {"malformed": 1.0}),
        ("None", True, {}),
    ],
)
def test_faults_of_an_output_are_counted(output, ended, shares):
    task = Text2TextNer(None, TYPES, max_length=64)
    example = EXAMPLES[2]
    scores = task.score([example], [said(output, example, ended)])
    names = ("malformed", "unknown_type", "truncated", "invented")
    assert {name: scores[name] for name in names} == {name: shares.get(name, 0.0) for name in names}
    assert scores["entity_recall"] == output.startswith("Al") / 3  # lost entities count as missed


@pytest.mark.parametrize("n_open", range(len(EXAMPLES) + 1))
def test_truncated_is_the_share_of_outputs_that_did_not_end(n_open):
    task = Text2TextNer(None, TYPES, max_length=64)
    answers = [said(t, e, ended=i >= n_open) for i, (t, e) in enumerate(zip(TARGETS, EXAMPLES, strict=True))]
    assert task.score(EXAMPLES, answers)["truncated"] == n_open / len(EXAMPLES)


@pytest.mark.parametrize(
    ("output", "right", "found"),
    [("Al: PER | Bo: PER", 2, 2), ("Al: PER | Al: PER | Al: PER", 2, 3), ("Al: PER | Al: LOC", 1, 2), ("None", 0, 0)],
)
def test_surface_f1_counts_duplicates(output, right, found):
    example = EXAMPLES[2]
    wanted = 3
    scores = Text2TextNer(None, TYPES, max_length=64).score([example], [said(output, example)])
    assert scores["surface_f1"] == pytest.approx(2 * right / (found + wanted))


def test_surface_f1_is_blind_to_the_place_and_entity_f1_is_not():
    example = of_words(["Al", "saw", "Al"], ["O", "O", "B-PER"])
    scores = Text2TextNer(None, TYPES, max_length=64).score([example], [said("Al: PER", example)])
    assert (scores["surface_f1"], scores["entity_f1"]) == (1.0, 0.0)


def test_json_has_text_entities_and_the_output():
    text = "  Al   met\tBo. "
    example = of_text(text)
    output = write(example.words, [Entity("PER", 0, 1), Entity("PER", 2, 3)])
    answer = said(output, example)
    line = Text2TextNer(None, TYPES, max_length=64).to_json(example, answer)
    assert list(line) == ["text", "entities", "generated"]
    assert (line["text"], line["generated"]) == (text, output)
    wanted = [("PER", name, text.index(name), text.index(name) + len(name)) for name in ("Al", "Bo")]
    keys = ("entity_group", "word", "start", "end")
    assert [tuple(entity[key] for key in keys) for entity in line["entities"]] == wanted
    assert {entity["score"] for entity in line["entities"]} == {answer.generated.score}
    assert json.loads(json.dumps(line)) == line
