"""Constrained decoding: everything right can be written, nothing wrong can."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from tests.tiny import items_of
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase, T5Config, T5ForConditionalGeneration

import lorakit
from lorakit.data.example import Example, of_words
from lorakit.data.read import read
from lorakit.data.tags import entities
from lorakit.tasks.constrained import Language
from lorakit.tasks.entity_list import align, parse, write
from lorakit.tasks.text2text_ner import Text2TextNer

DEMO = Path(lorakit.__file__).parent / "demo"
SHARED = Path(__file__).parents[3] / "shared" / "data"
TYPES = ("LOC", "MISC", "ORG", "PER")


def accepts(language: Language, ids: list[int]) -> bool:
    """Whether the automaton lets these tokens pass, one by one, to the end."""
    paths = language.begin()
    for token in ids:
        if token not in {path.ids[0] for path in paths}:
            return False
        paths = language.step(paths, token)
    return not paths


def right_outputs_pass(
    tokenizer: PreTrainedTokenizerBase, types: tuple[str, ...], examples: list[Example]
) -> list[str]:
    """The gold outputs that cannot be written."""
    lost = []
    for example in examples:
        gold = write(example.words, entities(example.tags))
        if not accepts(Language(tokenizer, types, example.words), tokenizer(gold)["input_ids"]):
            lost.append(gold)
    return lost


def test_every_bundled_gold_output_can_be_written() -> None:
    examples = list(read(str(DEMO / "entities-validation.conll"), "words").examples)
    assert right_outputs_pass(ByT5Tokenizer(), TYPES, examples) == []


@pytest.mark.shared
def test_every_gold_output_of_wnut17_can_be_written_by_t5s_tokenizer() -> None:
    if not SHARED.is_dir():
        pytest.skip("needs the public data sets beside the checkout")
    examples = list(read(str(SHARED / "wnut17" / "emerging.dev.conll"), "words").examples)
    types = tuple(sorted({entity.type for example in examples for entity in entities(example.tags)}))
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "t5_tokenizer")
    lost = right_outputs_pass(tokenizer, types, examples)
    assert len(lost) <= 0.01 * len(examples), lost  # symbols that T5's vocabulary lacks or joins to their neighbours


WORDS = ["Anna", "met", "Anna", "Smith", "of", "Smith", "and", "Sons", "in", "Port", "Louis", "."]
WRONG = [
    "",  # neither None nor a mention
    "Anna: PER | ",
    "Anna: CITY",
    "Bob: PER",
    "Ann: PER",  # no whole word
    "Anna Smith",
    "Smith: PER | Anna: PER | Anna: PER",  # the second stands before the first
    "Port Louis: LOC | Port Louis: LOC",
    "None | Anna: PER",
    "met of: PER",  # no run of words
]
RIGHT = ["None", "Anna: PER", "Anna: PER | Anna Smith: PER", "Smith and Sons: ORG | Port Louis: LOC", ".: MISC"]


@pytest.mark.parametrize("output", WRONG)
def test_wrong_output_cannot_be_written(output: str) -> None:
    tokenizer = ByT5Tokenizer()
    assert not accepts(Language(tokenizer, TYPES, WORDS), tokenizer(output)["input_ids"])


@pytest.mark.parametrize("output", RIGHT)
def test_right_output_can_be_written(output: str) -> None:
    tokenizer = ByT5Tokenizer()
    assert accepts(Language(tokenizer, TYPES, WORDS), tokenizer(output)["input_ids"])


def test_random_walks_are_well_formed_and_invent_nothing() -> None:
    tokenizer, rng = ByT5Tokenizer(), random.Random(0)
    language = Language(tokenizer, TYPES, WORDS)
    for _ in range(100):
        paths, written = language.begin(), []
        while paths:
            written.append(rng.choice(sorted({path.ids[0] for path in paths})))
            paths = language.step(paths, written[-1])
        parsed = parse(tokenizer.decode(written, skip_special_tokens=True), TYPES)
        assert (parsed.malformed, parsed.unknown_type) == (0, 0)
        assert align(parsed.mentions, WORDS).invented == 0


def test_random_model_writes_nothing_malformed_or_invented() -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    task = Text2TextNer(ByT5Tokenizer(), TYPES, 64, max_target_length=60, constrained=True)
    examples = [of_words(WORDS), of_words(["No", "one", "came", "."]), of_words(["Ütz", "!"])]
    with torch.inference_mode():
        raw = task.predict(model, task.collate(items_of(task, examples)))
    for example, generated in zip(examples, raw, strict=True):
        if generated.ended:
            answer = task.answer(example, [generated])
            assert (answer.parsed.malformed, answer.parsed.unknown_type, answer.aligned.invented) == (0, 0, 0)
