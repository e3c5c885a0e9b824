"""Constrained decoding over random weights of t5-small's shape with T5's tokenizer: faults, and what few rows save.

python benchmarks/constrained_decoding.py DATA [sentences]     DATA has t5_tokenizer/ and wnut17/
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from lorakit.data.read import read
from lorakit.data.tags import entities
from lorakit.tasks.decoding import Decoder
from lorakit.tasks.text2text_formats import FORMATS
from lorakit.tasks.text2text_ner import FAULTS, Text2TextNer

LIMIT = 64  # tokens of output; random weights seldom end by themselves


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
            answers = [task.answer(x, [next(rest) for _ in task.windows(x)]) for x in examples]
            scores = task.score(examples, answers)
            steps = max(len(raw.ids) for raw in raws)
            told = ", ".join(f"{fault} {scores[fault]:.3f}" for fault in (*FAULTS, "truncated"))
            way = "free" if not constrained else "constrained, few rows" if bare else "constrained, all rows"
            print(f"{name:9s} {way:22s} {took:6.1f} s CPU for {steps} steps of {len(raws)} rows; {told}", flush=True)
            written[way] = [raw.ids for raw in raws]
        print(
            f"{name:9s} same tokens: {written['constrained, few rows'] == written['constrained, all rows']}", flush=True
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 32)
