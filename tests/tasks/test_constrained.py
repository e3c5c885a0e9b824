"""Constrained decoding: everything right can be written, nothing wrong can."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.tiny import items_of
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, T5Config, T5ForConditionalGeneration

import lorakit
from lorakit.data.example import Example, of_words
from lorakit.data.read import read
from lorakit.data.tags import entities
from lorakit.tasks.text2text.decoding import Language, allowed
from lorakit.tasks.text2text.formats import FORMATS
from lorakit.tasks.text2text.ner import Text2TextNer, decode

DEMO = Path(lorakit.__file__).parent / "demo"
SHARED = Path(__file__).parents[3] / "shared" / "data"
TYPES = ("LOC", "MISC", "ORG", "PER")
NO_LIMIT = 10_000


def accepts(language: Language, ids: list[int]) -> bool:
    """Whether the automaton lets these tokens pass, one by one, to the end."""
    paths = language.begin()
    for token in ids:
        if token not in allowed(paths):
            return False
        paths = language.step(paths, token)
    return not paths


def lost(task: Text2TextNer, examples: list[Example]) -> list[str]:
    """The gold outputs that cannot be written."""
    pairs = zip(examples, task.encode(examples), strict=True)
    return [x.text for x, own in pairs if not all(accepts(task.language(i["source"]), i["labels"]) for i in own)]


@pytest.mark.parametrize("name", FORMATS)
def test_every_bundled_gold_output_can_be_written(name: str) -> None:
    examples = list(read(str(DEMO / "entities-validation.conll"), "words").examples)[::5]
    task = Text2TextNer(ByT5Tokenizer(), TYPES, NO_LIMIT, max_target_length=NO_LIMIT, constrained=True, format=name)
    assert lost(task, examples) == []


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("kind", "every"), [("t5_tokenizer", 12), ("byte_tokenizer", 48)])  # all: benchmarks/
def test_every_gold_output_of_wnut17_can_be_written(request, kind: str, every: int, name: str) -> None:
    tokenizer = request.getfixturevalue(kind)
    if not SHARED.is_dir():
        pytest.skip("needs the public data sets beside the checkout")
    examples = list(read(str(SHARED / "wnut17" / "emerging.dev.conll"), "words").examples)
    types = tuple(sorted({entity.type for example in examples for entity in entities(example.tags)}))
    odd = [x for x in examples if entities(x.tags) or not x.text.isascii()]
    task = Text2TextNer(tokenizer, types, NO_LIMIT, max_target_length=NO_LIMIT, constrained=True, format=name)
    assert lost(task, odd[::every]) == []


def language(name: str, words: list[str], tokenizer: PreTrainedTokenizerBase) -> Language:
    return Language(tokenizer, partial(FORMATS[name].ways, words=words, types=TYPES))


WORDS = ["Anna", "met", "Anna", "Smith", "of", "Smith", "and", "Sons", "in", "Port", "Louis", "."]
PAIR = ["Anna", "met"]
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
WRONG_PAIR = ["", "Anna", "Anna Anna met", "[ Anna met", "[ Anna | CITY ] met", "[ | PER ] Anna met", "Anna met ."]
RIGHT_PAIR = ["Anna met", "[ Anna | PER ] met", "[ Anna met | ORG ]", "[ Anna | PER ] [ met | LOC ]"]
CASES = [
    *(("list", WORDS, output, False) for output in WRONG),
    *(("list", WORDS, output, True) for output in RIGHT),
    *(("tanl", PAIR, output, False) for output in WRONG_PAIR),
    *(("tanl", PAIR, output, True) for output in RIGHT_PAIR),
]


@pytest.mark.parametrize(("name", "words", "output", "is_right"), CASES)
def test_right_output_can_be_written_and_no_other(name: str, words: list[str], output: str, is_right: bool) -> None:
    tokenizer = ByT5Tokenizer()
    assert accepts(language(name, words, tokenizer), tokenizer(output)["input_ids"]) == is_right


@pytest.mark.parametrize("name", FORMATS)
def test_random_walks_are_well_formed_and_invent_nothing(name: str) -> None:
    tokenizer, rng = ByT5Tokenizer(), random.Random(0)
    automaton = language(name, WORDS, tokenizer)
    for _ in range(30):
        paths, written = automaton.begin(), []
        while paths:
            written.append(rng.choice(sorted(allowed(paths))))
            paths = automaton.step(paths, written[-1])
        reading = FORMATS[name].read(decode(tokenizer, written), WORDS, TYPES)
        assert (reading.malformed, reading.unknown_type, reading.invented, reading.misordered) == (0, 0, 0, 0)


@pytest.mark.parametrize("limit", [7, 60])
@pytest.mark.parametrize("name", FORMATS)
def test_random_model_writes_nothing_malformed_or_invented(name: str, limit: int) -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    task = Text2TextNer(ByT5Tokenizer(), TYPES, 400, max_target_length=limit, constrained=True, format=name)
    examples = [of_words(WORDS), of_words(["No", "one", "came", "."]), of_words(["Ütz", "|", "!"])]
    with torch.inference_mode():
        raw = task.predict(model, task.collate(items_of(task, examples)))
    answers = [task.answer(example, [one]) for example, one in zip(examples, raw, strict=True)]
    scores = task.evaluate([of_words(x.words, ["O"] * len(x.words)) for x in examples], answers).scores
    assert [scores[key] for key in ("malformed", "unknown_type", "invented", "misordered")] == [0, 0, 0, 0]
    assert scores["truncated"] == sum(not one.ended for one in raw) / len(raw)
