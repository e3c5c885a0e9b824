"""Entities as text by a tiny T5 over bytes: targets, loss and greedy decoding against a plain loop."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.tiny import items_of, taught
from transformers import ByT5Tokenizer, T5ForConditionalGeneration

from lorakit.data.example import Example, of_text, of_words
from lorakit.data.tags import entities
from lorakit.errors import ConfigError
from lorakit.tasks.base import IGNORE, Batch
from lorakit.tasks.text2text.decoding import Written
from lorakit.tasks.text2text.formats import FORMATS
from lorakit.tasks.text2text.ner import Extracted, Text2TextNer, decode

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
def task(byte_tokenizer: ByT5Tokenizer) -> Text2TextNer:
    return Text2TextNer(byte_tokenizer, TYPES, max_length=64, prefix="", max_target_length=32)


@pytest.fixture(scope="module")
def batch(task: Text2TextNer) -> Batch:
    return task.collate(items_of(task, EXAMPLES))


@pytest.fixture(scope="module")
def trained(task: Text2TextNer, batch: Batch, make_writer: Callable[[], T5ForConditionalGeneration]) -> torch.nn.Module:
    """A model that a few steps on the task's own loss taught to write something like the targets."""
    return taught(make_writer(), task, batch)


@pytest.fixture(scope="module")
def said(byte_tokenizer: ByT5Tokenizer) -> Callable[..., Extracted]:
    """The answer that a text amounts to."""

    def say(text: str, example: Example, ended: bool = True, **knobs: Any) -> Extracted:
        task = Text2TextNer(byte_tokenizer, TYPES, max_length=64, **knobs)
        ids = byte_tokenizer(text, add_special_tokens=False)["input_ids"]
        return task.answer(example, [Written(tuple(ids), ended, score=0.5)])

    return say


@torch.no_grad()
def greedy(model: Any, ids: list[int], limit: int) -> tuple[list[int], float]:
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
    assert batch["n_targets"].sum() == sum(lengths) == sum(len(target) + 1 for target in TARGETS)  # and an end token


def test_loss_is_that_of_transformers_times_the_targets(task, batch, make_writer):
    model = make_writer().eval()
    torch.testing.assert_close(task.losses(model, batch).sum(), model(**batch).loss * batch["n_targets"].sum())


def test_no_logits_are_computed_of_padding(task, batch, make_writer):
    model = make_writer()
    seen: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[:-1]))
    task.losses(model, batch).sum()
    task.losses(
        model, {**batch, "labels": torch.full_like(batch["labels"], IGNORE)}
    ).sum().backward()  # a share without rows
    assert seen == [(int(batch["n_targets"].sum()),), (0,)]
    model(input_ids=batch["input_ids"], labels=batch["labels"])
    assert seen[-1] == batch["labels"].shape


def test_loss_of_a_batch_is_the_sum_of_its_rows(task, batch, make_writer):
    model = make_writer().eval()
    rows = [task.losses(model, task.collate([item])).sum() for item in items_of(task, EXAMPLES)]
    torch.testing.assert_close(task.losses(model, batch).sum(), torch.stack(rows).sum())


@pytest.mark.parametrize("limit", [CUT, 32])
def test_answers_of_a_batch_equal_a_plain_loop_over_its_rows(task, byte_tokenizer, trained, limit):
    task = Text2TextNer(byte_tokenizer, TYPES, max_length=64, prefix="", max_target_length=limit)
    items = items_of(task, EXAMPLES)
    with torch.no_grad():
        found = task.predict(trained, task.collate(items))
    loops = [greedy(trained, item["input_ids"], limit) for item in items]
    assert [list(answer.ids) for answer in found] == [output for output, _ in loops]
    assert [answer.ended for answer in found] == [o[-1] == byte_tokenizer.eos_token_id for o, _ in loops]
    means = torch.tensor([mean for _, mean in loops]).exp().tolist()
    assert [answer.score for answer in found] == pytest.approx(means, rel=1e-3)
    if limit == CUT:
        assert {answer.ended for answer in found} == {True, False}


@torch.no_grad()
def test_training_on_the_loss_teaches_to_write_and_to_stop(task, batch, trained):
    none = TARGETS.index("None")
    answer = task.predict(trained, batch)[none]
    assert (decode(task.tokenizer, answer.ids), answer.ended) == ("None", True)


FAULTS = ("malformed", "unknown_type", "invented", "misordered", "truncated")


@pytest.mark.parametrize("name", FORMATS)
def test_perfect_outputs_score_one(byte_tokenizer, said, name):
    task = Text2TextNer(byte_tokenizer, TYPES, max_length=64, format=name)
    answers = [said(task.expected(example), example, format=name) for example in EXAMPLES]
    scores = task.evaluate(EXAMPLES, answers).scores
    assert [scores[key] for key in ("entity_f1", "entity_f1_strict", "surface_f1")] == [1, 1, 1]
    assert [scores[key] for key in FAULTS] == [0] * len(FAULTS)


@pytest.mark.parametrize(
    ("output", "ended", "shares"),
    [
        ("Al: PER | Bo: PE", False, {"truncated"}),
        ("Al: PER | Bo: PE | Bo", False, {"truncated", "unknown_type"}),
        ("Al: PER | Bo", False, {"truncated"}),
        ("Al: PER | Bo", True, {"malformed"}),
        ("Al: PER | Eve: PER", True, {"invented"}),
        ("Al: PER | Al: PER | Bo: PER", True, {"misordered"}),
        ("", True, {"malformed"}),
        ("None", True, set()),
    ],
)
def test_faults_of_an_output_are_counted(task, said, output, ended, shares):
    example = EXAMPLES[2]
    scores = task.evaluate([example], [said(output, example, ended)]).scores
    assert {name for name in FAULTS if scores[name]} == shares
    assert {scores[name] for name in shares} <= {1.0}
    named = output.count("Al: PER") + output.count("Bo: PER")
    assert scores["entity_recall"] == named / 3  # lost entities count as missed


def test_truncated_is_the_share_of_outputs_that_did_not_end(task, said):
    for n_open in range(len(EXAMPLES) + 1):
        answers = [said(t, e, ended=i >= n_open) for i, (t, e) in enumerate(zip(TARGETS, EXAMPLES, strict=True))]
        assert task.evaluate(EXAMPLES, answers).scores["truncated"] == n_open / len(EXAMPLES)


@pytest.mark.parametrize(
    ("output", "right", "found"),
    [("Al: PER | Bo: PER", 2, 2), ("Al: PER | Al: PER | Al: PER", 2, 3), ("Al: PER | Al: LOC", 1, 2), ("None", 0, 0)],
)
def test_surface_f1_counts_duplicates(task, said, output, right, found):
    example = EXAMPLES[2]
    wanted = 3
    scores = task.evaluate([example], [said(output, example)]).scores
    assert scores["surface_f1"] == pytest.approx(2 * right / (found + wanted))


def test_surface_f1_is_blind_to_the_place_and_entity_f1_is_not(task, said):
    example = of_words(["Al", "saw", "Al"], ["O", "O", "B-PER"])
    scores = task.evaluate([example], [said("Al: PER", example)]).scores
    assert (scores["surface_f1"], scores["entity_f1"]) == (1.0, 0.0)


def test_json_has_text_entities_and_the_output(task, said):
    text = "  Al   met\tBo. "
    example = of_text(text)
    output = "Al: PER | Bo: PER"
    answer = said(output, example)
    line = task.to_json(example, answer)
    assert list(line) == ["text", "entities", "generated"]
    assert (line["text"], line["generated"]) == (text, output)
    wanted = [("PER", name, text.index(name), text.index(name) + len(name)) for name in ("Al", "Bo")]
    keys = ("entity_group", "word", "start", "end")
    assert [tuple(entity[key] for key in keys) for entity in line["entities"]] == wanted
    assert {entity["score"] for entity in line["entities"]} == {answer.written.score}
    assert json.loads(json.dumps(line)) == line


@pytest.mark.parametrize("name", FORMATS)
def test_words_with_the_signs_of_the_format_are_found_again(byte_tokenizer, said, name):
    example = of_words(["[x]", "AC|DC", "</s>", "<extra_id_1>", "a:"], ["O", "B-LOC", "I-LOC", "I-LOC", "B-PER"])
    task = Text2TextNer(byte_tokenizer, TYPES, max_length=64, format=name)
    assert said(task.expected(example), example, format=name).tags == example.tags


@pytest.mark.parametrize("name", FORMATS)
def test_texts_targets_and_entities_that_limits_cut_off_are_counted(byte_tokenizer, name):
    example = EXAMPLES[2]

    def cut(max_length: int, max_target_length: int) -> tuple[int, ...]:
        task = Text2TextNer(
            byte_tokenizer, TYPES, max_length, prefix="", max_target_length=max_target_length, format=name
        )
        return tuple(task.cut([example], task.encode([example])))

    task = Text2TextNer(byte_tokenizer, TYPES, 999, prefix="", format=name)
    words, n = task.spelling.words(example.words), len(example.words)
    ends = [len(byte_tokenizer(" ".join(words[:i]))["input_ids"]) for i in range(n + 1)]
    target = len(byte_tokenizer(task.expected(example))["input_ids"])
    assert cut(ends[-1], target) == (0, 0, 0)
    assert cut(ends[-1] - 1, target) == (1, 0, 1)
    assert cut(ends[3], target) == (1, 0, 1)
    assert cut(ends[3] - 1, target) == (1, 0, 2)
    assert cut(ends[1] - 1, target) == (1, 0, 3)
    assert cut(ends[-1], target - 1)[:2] == (0, 1)
    assert cut(ends[-1], 2) == (0, 1, 3)
    assert [cut(ends[-1], limit)[2] for limit in range(2, target + 1)] == sorted(
        (cut(ends[-1], limit)[2] for limit in range(2, target + 1)), reverse=True
    )


# What cannot be used is refused at the start


@pytest.mark.parametrize(
    ("name", "kind"),
    [("list", "a|b"), ("list", "ns:PER"), ("tanl", "a|b"), ("tanl", "[x]"), ("list", " PER")],
)
def test_type_that_does_not_survive_is_refused_with_its_name(byte_tokenizer, name, kind):
    with pytest.raises(
        ConfigError, match=rf"task.format = '{name}': the entity type {re.escape(repr(kind))} is not preserved"
    ):
        _ = Text2TextNer(byte_tokenizer, ("PER", kind), 64, format=name).form


@pytest.mark.parametrize("name", FORMATS)
def test_odd_types_survive(byte_tokenizer, name):
    for kind in ("geo-loc", "group name", "B-PER", "ns.PER", "日", "O", "None"):
        task = Text2TextNer(byte_tokenizer, (kind,), 64, format=name)
        example = of_words(["a", "b", "c"], ["O", f"B-{kind}", f"I-{kind}"])
        raw = Written(tuple(byte_tokenizer(task.expected(example))["input_ids"]), True, 1.0)
        assert entities(task.answer(example, [raw]).tags) == entities(example.tags)


@pytest.mark.parametrize(("name", "sign"), [("list", "|"), ("tanl", "[")])
def test_tokenizer_without_the_signs_of_the_format_is_refused(word_pieces, name, sign):
    with pytest.raises(ConfigError, match=rf"task.format = '{name}': .*{re.escape(sign)}.*try '"):
        _ = Text2TextNer(word_pieces, TYPES, 64, format=name).form
