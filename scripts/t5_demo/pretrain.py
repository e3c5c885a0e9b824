"""Pre-train ``t5-demo``, the small bundled base model, from nothing on two CPU cores.

    python scripts/t5_demo/pretrain.py --seed 0 --out build/t5-demo

The learning rate starts high and then falls in a line to zero at the last step.  A run can be
cut early: ``--resume CHECKPOINT --steps FEWER`` continues it down a steeper line.  Neither time
nor evaluation influences the weights.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from corpus import DATA, read_unlabelled
from grammar import Grammar
from mixture import EOS, ORDERS, PAD, TAGS, UNKNOWN, Mixture, batches, decode, encode, pad
from muon import Muon
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ByT5Tokenizer, T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import Seq2SeqLMOutput

log = logging.getLogger("t5-demo")
Labelled = list[tuple[str, str]]


@dataclass(frozen=True)
class Schedule:
    """A short hot start, then a lower rate that falls to zero, as a factor of the peak rate.

    The high rate makes copying emerge within 150 steps, but the model gains nothing more from
    it after some hundred: it forgets as fast as it learns.
    """

    steps: int
    warmup: int = 150
    hot: int = 800
    cool: float = 0.3

    def factor(self, step: int) -> float:
        """The factor at a step counted from zero."""
        if step < self.hot:
            return min(1.0, (step + 1) / self.warmup)
        return self.cool * (self.steps - step) / (self.steps - self.hot)


def build_model() -> T5ForConditionalGeneration:
    """A T5 of 3.6 million weights over bytes; shallow decoder, since it mostly copies."""
    config = T5Config(
        vocab_size=384, d_model=192, d_kv=32, num_heads=6, d_ff=768, num_layers=4, num_decoder_layers=3,
        dropout_rate=0.0, feed_forward_proj="relu", tie_word_embeddings=True,
        decoder_start_token_id=PAD, pad_token_id=PAD, eos_token_id=EOS,
    )  # fmt: skip
    config._attn_implementation = "eager"  # a little faster than SDPA here: sequences are short
    model = T5ForConditionalGeneration(config)
    look_at_neighbours(model)
    return model


@torch.no_grad()
def look_at_neighbours(model: T5ForConditionalGeneration) -> None:
    """Start half of the self-attention heads as views of single neighbours.

    To copy, the decoder has to find the place in the source that its last few bytes match, so
    encoder and decoder must both know the bytes just before a position.  With the heads that
    see them in place, copying is learned in hundreds of steps; from zero it takes thousands.
    In T5 the bucket of a short distance back is the distance, and 16 more ahead in the encoder.
    """
    for stack, buckets in ((model.encoder, (1, 2, 3, 17)), (model.decoder, (1, 2, 3))):
        bias = stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        bias.zero_()
        for head, bucket in enumerate(buckets):
            bias[bucket, head] = 8.0


class Hints(nn.Module):
    """What the model is told while it trains, and what is thrown away afterwards.

    Two linear heads on the encoder name the type and the number of the entity that a byte
    belongs to; one cross-attention head in each of the upper decoder blocks is led to the byte
    that is due (guided alignment, Chen et al. 2016, arXiv:1607.01628).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tags = nn.Linear(width, TAGS)
        self.orders = nn.Linear(width, ORDERS)

    def forward(self, output: Seq2SeqLMOutput, hints: dict[str, Tensor]) -> Tensor:
        """The sum of the losses; each is a mean over the bytes whose hint is known."""
        hidden = output.encoder_last_hidden_state
        known = hints["tags"].ne(UNKNOWN)
        loss = hidden.new_zeros(())
        if known.any():
            loss = loss + F.cross_entropy(self.tags(hidden[known]), hints["tags"][known])
            loss = loss + F.cross_entropy(self.orders(hidden[known]), hints["orders"][known])
        known = hints["origins"].ne(UNKNOWN)
        if known.any():
            rows, columns = known.nonzero(as_tuple=True)
            origins = hints["origins"][known]
            for attention in output.cross_attentions[1:]:
                loss = loss - (attention[rows, 0, columns, origins] + 1e-6).log().mean() / 2
        return loss


def build_optimizers(model: nn.Module, hints: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings, norms and position biases."""
    named = dict(model.named_parameters())
    matrices = {
        name for name, weight in named.items() if weight.ndim == 2 and "shared" not in name and "relative" not in name
    }
    rest = [weight for name, weight in named.items() if name not in matrices] + list(hints.parameters())
    return [
        Muon([named[name] for name in named if name in matrices], lr=rate),
        torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def read_labelled(path: Path) -> Labelled:
    """Sentences and targets of a CoNLL file, used only to measure."""
    pairs = []
    for block in path.read_text(encoding="utf-8").strip().split("\n\n"):
        rows = [line.split("\t") for line in block.splitlines()]
        spans: list[tuple[list[str], str]] = []
        for word, tag in rows:
            if tag.startswith("B-"):
                spans.append(([word], tag[2:]))
            elif tag.startswith("I-"):
                spans[-1][0].append(word)
        target = " | ".join(f"{' '.join(words)}: {kind}" for words, kind in spans) or "None"
        pairs.append((" ".join(word for word, _ in rows), target))
    return pairs


@torch.inference_mode()
def answer(model: T5ForConditionalGeneration, sources: list[str], batch_size: int = 64) -> list[str]:
    """Greedy answers, in the order of the sources."""
    model.eval()
    order = sorted(range(len(sources)), key=lambda index: len(sources[index]))
    answers = [""] * len(sources)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids = pad([encode(sources[index]) for index in chosen], PAD)
        made = model.generate(input_ids=ids, attention_mask=ids.ne(PAD).long(), max_new_tokens=180, do_sample=False)
        for index, row in zip(chosen, made.tolist(), strict=True):
            answers[index] = decode(row)
    model.train()
    return answers


def entity_f1(predicted: list[str], gold: list[str]) -> float:
    """Micro F1 in percent over the entities with their types, as multisets per sentence."""
    hits = found = wanted = 0
    for guess, truth in zip(predicted, gold, strict=True):
        left, right = (Counter(part for part in text.split(" | ") if ": " in part) for text in (guess, truth))
        hits += (left & right).total()
        found += left.total()
        wanted += right.total()
    return 200 * hits / max(1, found + wanted)


def evaluate(model: T5ForConditionalGeneration, sets: dict[str, Labelled]) -> dict[str, float]:
    """F1 on every set."""
    figures = {}
    for name, pairs in sets.items():
        guesses = answer(model, ["ner: " + text for text, _ in pairs])
        figures[name] = round(entity_f1(guesses, [target for _, target in pairs]), 1)
    return figures


def evaluation_sets() -> dict[str, Labelled]:
    """Fresh machine-made sentences and the bundled validation sentences."""
    grammar = Grammar(987654321, read_unlabelled())
    fresh = [grammar.sentence() for _ in range(128)]
    return {
        "grammar": [(sentence.text, sentence.target()) for sentence in fresh],
        "validation": read_labelled(DATA / "entities-validation.conll"),
    }


def export(model: T5ForConditionalGeneration, folder: Path) -> None:
    """Write weights in bf16, configuration and tokenizer as transformers expects them."""
    copy = build_model()
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    ByT5Tokenizer().save_pretrained(folder)


def train(arguments: argparse.Namespace) -> None:
    """The whole run: steps, checkpoints, evaluation, export."""
    torch.manual_seed(arguments.seed)
    model = build_model()
    hints = Hints(model.config.d_model)
    optimizers = build_optimizers(model, hints, arguments.rate)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    parts = nn.ModuleDict({"model": model, "hints": hints})
    done = resume(arguments.resume, parts, optimizers) if arguments.resume else 0
    schedule = Schedule(arguments.steps)
    mixture = Mixture(arguments.seed, read_unlabelled())
    source = islice(batches(mixture, arguments.tokens, arguments.warm_batches), done, None)
    sets, losses, began = evaluation_sets(), [], time.monotonic()
    for step in range(done, arguments.steps):
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * schedule.factor(step)
        batch, known = next(source)
        output = model(**batch, output_attentions=True)
        (output.loss + arguments.hints * hints(output, known)).backward()
        nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(output.loss.item())
        if (step + 1) % 50 == 0:
            minutes = (time.monotonic() - began) / 60
            log.info("step %d  loss %.4f  %.1f min", step + 1, sum(losses[-50:]) / 50, minutes)
        if (step + 1) % arguments.save_every == 0 or step + 1 == arguments.steps:
            save(arguments.out, step + 1, parts, optimizers)
            log.info("step %d  F1 %s", step + 1, json.dumps(evaluate(model, sets)))
    export(model, arguments.out / "model")


def save(folder: Path, step: int, parts: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """A checkpoint that ``--resume`` takes up; the data are drawn again from the seed."""
    states = [optimizer.state_dict() for optimizer in optimizers]
    torch.save({"step": step, "parts": parts.state_dict(), "optimizers": states}, folder / f"step-{step}.pt")


def resume(path: Path, parts: nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    """Load a checkpoint and return the number of steps done."""
    state = torch.load(path, weights_only=True)
    parts.load_state_dict(state["parts"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return int(state["step"])


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Pre-train the bundled demonstration model.")
    parser.add_argument("--steps", type=int, default=3500, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints, log and model")
    parser.add_argument("--tokens", type=int, default=5000, help="padded bytes in a batch, source and target")
    parser.add_argument("--rate", type=float, default=5e-3, help="peak learning rate of the matrices")
    parser.add_argument("--hints", type=float, default=0.3, help="weight of what the model is told besides")
    parser.add_argument("--warm-batches", type=int, default=200, help="opening batches of short copying")
    parser.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", type=Path, help="checkpoint to go on from")
    return parser.parse_args()


def main() -> None:
    """Set up logging and arithmetic, then train."""
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.StreamHandler(), logging.FileHandler(arguments.out / "log.txt")]
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=handlers)
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    train(arguments)


if __name__ == "__main__":
    main()
