"""Constrained decoding over random weights of t5-small's shape with T5's tokenizer: faults, and what few rows save.

python benchmarks/constrained_decoding.py DATA [sentences]     DATA has t5_tokenizer/ and wnut17/
python benchmarks/constrained_decoding.py DATA reach           whether every gold answer can be written
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import AutoTokenizer, ByT5Tokenizer, T5Config, T5ForConditionalGeneration

from lorakit.data.read import read
from lorakit.data.tags import entities
from lorakit.tasks.text2text.decoding import Decoder, Language
from lorakit.tasks.text2text.formats import FORMATS
from lorakit.tasks.text2text.ner import FAULTS, Text2TextNer

LIMIT = 64  # tokens of output; random weights seldom end by themselves


def accepts(language: Language, ids: list[int]) -> bool:
    """Whether these tokens may be written, one by one, to the end."""
    paths = language.begin()
    for token in ids:
        paths = language.step(paths, token)
        if not paths:
            return token == language.eos
    return False


def reach(data: Path) -> None:
    """Print how many gold answers of WNUT-17's three files cannot be written, in each format with both tokenizers."""
    for tokenizer in (AutoTokenizer.from_pretrained(data / "t5_tokenizer"), ByT5Tokenizer()):
        for file in ("wnut17train.conll", "emerging.dev.conll", "emerging.test.annotated"):
            examples = list(read(str(data / "wnut17" / file), "words").examples)
            types = tuple(sorted({entity.type for example in examples for entity in entities(example.tags)}))
            for name in FORMATS:
                task = Text2TextNer(tokenizer, types, 10**6, max_target_length=10**6, constrained=True, format=name)
                items = [item for own in task.encode(examples) for item in own]
                lost = sum(not accepts(task.language(item["source"]), item["labels"]) for item in items)
                print(f"{type(tokenizer).__name__} {file} {name}: {lost} of {len(items)} cannot be written", flush=True)


def main(data: Path, n: int) -> None:
    """Print a line a format and a way of decoding."""
    tokenizer = AutoTokenizer.from_pretrained(data / "t5_tokenizer")
    examples = list(read(str(data / "wnut17" / "emerging.dev.conll"), "words").examples)[:n]
    types = tuple(sorted({entity.type for example in examples for entity in entities(example.tags)}))
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=32128, decoder_start_token_id=0)).eval()
    for name in FORMATS:
        written = {}
        for constrained, bare in ((False, True), (True, False), (True, True)):
            task = Text2TextNer(tokenizer, types, 512, max_target_length=LIMIT, constrained=constrained, format=name)
            batch = task.collate([item for own in task.encode(examples) for item in own])
            with patch.object(Decoder, "_has_bare_head", lambda self, bare=bare: bare):
                began = time.process_time()
                raws = task.predict(model, batch)
                took = time.process_time() - began
            rest = iter(raws)
            answers = [task.answer(x, [next(rest)] if x.words else []) for x in examples]
            scores = task.evaluate(examples, answers).scores
            steps = max(len(raw.ids) for raw in raws)
            told = ", ".join(f"{fault} {scores[fault]:.3f}" for fault in (*FAULTS, "truncated"))
            way = "free" if not constrained else "constrained, few rows" if bare else "constrained, all rows"
            print(f"{name:9s} {way:22s} {took:6.1f} s CPU for {steps} steps of {len(raws)} rows; {told}", flush=True)
            written[way] = [raw.ids for raw in raws]
        print(
            f"{name:9s} same tokens: {written['constrained, few rows'] == written['constrained, all rows']}", flush=True
        )


if __name__ == "__main__":
    folder, *words = sys.argv[1:]
    if words == ["reach"]:
        reach(Path(folder))
    else:
        main(Path(folder), int(words[0]) if words else 32)
