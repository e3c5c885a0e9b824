"""Tiny model folders, tiny data files and recipes over them: what a test of a whole run needs, made on the spot.

The models are random and have dropout; the sentences are separable, so that a few steps teach something.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import ByteLevelBPETokenizer

from lorakit.errors import LorakitError
from lorakit.recipe import Recipe, make_recipe
from lorakit.runtime.events import Event, Report, ignore
from lorakit.training.checkpoint import find_checkpoint
from lorakit.training.joint import prepare_all
from lorakit.training.prepare import Prepared
from lorakit.training.results import Result
from lorakit.training.run import Run
from lorakit.training.run_files import run_folder

GOOD, BAD = ("superb", "lovely", "moving", "fresh"), ("dreadful", "stale", "clumsy", "boring")
NEUTRAL = ("the", "film", "plot", "was", "a", "rather", "cast", "and", "scene", "last")
PEOPLE, PLACES = ("Ada", "Omar", "Ines", "Paul"), ("Oslo", "Lima", "Rome", "Cairo")
VERBS = ("visited", "left", "likes", "saw", "in", "spring", ".")
WORDS = (*GOOD, *BAD, *NEUTRAL, *(w.lower() for w in (*PEOPLE, *PLACES)), *VERBS)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # ten times the usual one, so that random features tell words apart
}
DROPOUT = 0.1
BYTES = 384  # ByT5's vocabulary: 256 bytes and its special tokens

Sections = dict[str, dict[str, Any]]


# Model folders


def save_bert(folder: Path, seed: int = 0) -> Path:
    """A BERT encoder without pooler and head, so that both are newly initialised, and a WordPiece tokenizer."""
    torch.manual_seed(seed)
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    config = transformers.BertConfig(vocab_size=len(vocabulary), **SIZES)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    transformers.BertTokenizerFast(vocab=vocabulary).save_pretrained(folder)
    return folder


def save_roberta(folder: Path) -> Path:
    """A RoBERTa encoder and a byte-level BPE trained on the words."""
    torch.manual_seed(0)
    bpe = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe.train_from_iterator([" ".join(WORDS)], vocab_size=300, show_progress=False, special_tokens=special)
    folder.mkdir(parents=True)
    bpe.save_model(str(folder))
    files = {"vocab": str(folder / "vocab.json"), "merges": str(folder / "merges.txt")}
    config = transformers.RobertaConfig(vocab_size=300, pad_token_id=1, bos_token_id=0, eos_token_id=2, **SIZES)
    transformers.RobertaModel(config, add_pooling_layer=False).save_pretrained(folder)
    transformers.RobertaTokenizerFast(**files).save_pretrained(folder)
    return folder


def save_t5(folder: Path) -> Path:
    """A T5 over bytes, which needs no vocabulary file."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 24, "num_layers": 3}
    config = transformers.T5Config(vocab_size=BYTES, decoder_start_token_id=0, **sizes)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    transformers.ByT5Tokenizer().save_pretrained(folder)
    return folder


# Data files


def reviews(n: int, seed: int = 0) -> list[tuple[str, str]]:
    """n (text, label) of different length; one word decides the label."""
    chance = random.Random(seed)
    rows = []
    for i in range(n):
        label, words = (("good", GOOD), ("bad", BAD))[i % 2]
        text = [*chance.choices(NEUTRAL, k=chance.randint(1, 9)), chance.choice(words)]
        chance.shuffle(text)
        rows.append((" ".join(text), label))
    return rows


def write_reviews(path: Path, n: int, seed: int = 0) -> Path:
    lines = [f"{text},{label}" for text, label in reviews(n, seed)]
    path.write_text("\n".join(["text,label", *lines]) + "\n", encoding="utf-8")
    return path


def write_pairs(path: Path, n: int, seed: int = 0) -> Path:
    """A word of a review, the review, and another one without the word."""
    every = [text for text, _ in reviews(n, seed)]
    rows = [(word := text.split()[-1], text, next((t for t in every if word not in t), "")) for text in every]
    path.write_text("\n".join(["query,positive,negative", *map(",".join, rows)]) + "\n")
    return path


def write_choices(path: Path, n: int, seed: int = 0) -> Path:
    """A question with two or three reviews to choose from, of which one is good."""
    chance, rows = random.Random(seed), []
    every = reviews(4 * n, seed)
    of = {label: [text for text, own in every if own == label] for label in ("good", "bad")}
    for i in range(n):
        choices = [chance.choice(of["bad"]) for _ in range(1 + i % 2)]
        at = chance.randint(0, len(choices))
        choices.insert(at, chance.choice(of["good"]))
        rows.append(f"which one,{','.join((*choices, '')[:3])},{'ABC'[at]}")
    path.write_text("\n".join(["question,choice1,choice2,choice3,answer", *rows]) + "\n")
    return path


def write_ratings(path: Path, n: int, seed: int = 0) -> Path:
    """The reviews with other labels: topics, of which some have none, and stars from -1.5 to 1.5."""
    chance = random.Random(seed)
    lines = []
    for text, label in reviews(n, seed):
        topics = [topic for topic in ("plot", "cast", "scene") if topic in text.split()]
        stars = (1 if label == "good" else -1) + chance.choice((-0.5, 0, 0.5))
        lines.append(f"{text},{'|'.join(topics)},{stars}")
    path.write_text("\n".join(["text,topics,stars", *lines]) + "\n", encoding="utf-8")
    return path


def write_entities(path: Path, n: int, seed: int = 0) -> Path:
    """n sentences whose lengths, and so whose numbers of labels, differ a lot."""
    chance = random.Random(seed)
    blocks = []
    for _ in range(n):
        words = [(chance.choice(PEOPLE), "B-PER"), (chance.choice(VERBS), "O"), (chance.choice(PLACES), "B-LOC")]
        words += [(chance.choice(NEUTRAL), "O") for _ in range(chance.choice((0, 1, 14)))]
        blocks.append("".join(f"{word} {tag}\n" for word, tag in words))
    path.write_text("\n".join(blocks), encoding="utf-8")
    return path


# Recipes and runs

# By task: the ending of its files, and the columns that it reads; all others read words with tags.
DATA: dict[str, tuple[str, dict[str, Any]]] = {
    "sequence_classification": ("csv", {}),
    "multi_label_classification": ("ratings.csv", {"label": "topics", "label_separator": "|"}),
    "ordinal_classification": ("ratings.csv", {"label": "stars"}),
    "sequence_regression": ("ratings.csv", {"label": "stars"}),
    "text2text_classification": ("csv", {}),
    "text2text_generation": ("csv", {}),
    "embedding": ("csv", {}),
    "reranker": ("pairs.csv", {"pair": "positive"}),
    "multiple_choice": ("choices.csv", {"choices": ["choice1", "choice2", "choice3"]}),
}


def sections(base: Path, data: Path, task: str = "sequence_classification") -> Sections:
    """A recipe's sections: 2 epochs of 5 steps over 36 examples, the last batch of 4."""
    ending, columns = DATA.get(task, ("conll", {}))
    return {
        "model": {"base": str(base), "dtype": "fp32"},
        "data": {"train": str(data / f"train.{ending}"), "validation": str(data / f"validation.{ending}"), **columns},
        "task": {"name": task}
        | ({"max_target_length": 12} if task in ("text2text_ner", "text2text_generation") else {}),
        "lora": {"r": 4, "dropout": DROPOUT},
        "train": {"epochs": 2, "batch_size": 8, "lr": 2e-2, "head_start": "random"},
    }


def changed(raw: Sections, *words: str) -> Recipe:
    """The recipe of some sections, changed by key=value words."""
    return make_recipe(raw, words)


def start(recipe: Recipe, folder: Path, report: Report = ignore) -> Run:
    """A run that is ready for its first step."""
    (prepared,) = prepare_all([recipe])
    if isinstance(prepared, LorakitError):
        raise prepared
    folder.mkdir(parents=True, exist_ok=True)
    return Run(prepared, folder, report)


def resumed(recipe: Recipe, folder: Path, report: Report = ignore, where: str = "auto") -> Run:
    """A run that is ready to go on."""
    checkpoint = find_checkpoint(folder, where, report)
    assert checkpoint is not None
    run = start(recipe, folder, report)
    run.restore(checkpoint)
    return run


def fit(recipe: Recipe, folder: Path, report: Report = ignore) -> Result:
    """Train without the pictures, which take longer than the training."""
    with run_folder(folder, None):
        return start(recipe, folder, report).fit()


def without_pictures(patch: pytest.MonkeyPatch) -> None:
    """Let runs of the API leave out pictures and pages, which take longer than the training."""
    for name in ("write_figures", "write_report"):
        patch.setattr(f"lorakit.app.api.{name}", lambda *_: None)


class Stopped(Exception):
    """Stands for a kill between two steps."""


def stop_after(step: int) -> Report:
    """A report that ends the run as soon as this step has been done, before anything is saved of it."""

    def report(event: Event) -> None:
        if getattr(event, "number", None) == step:
            raise Stopped

    return report


def taken_up(recipe: Recipe, folder: Path, step: int) -> Run:
    """A run that was killed after this step, and is ready to go on from its newest checkpoint."""
    with pytest.raises(Stopped):
        fit(recipe, folder, stop_after(step))
    return resumed(recipe, folder)


def weights(folder: Path) -> bytes:
    """The bytes of the adapter that a run has left."""
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def values(prepared: Prepared) -> dict[str, torch.Tensor]:
    """A copy of every parameter by path."""
    return {name: parameter.detach().clone() for name, parameter in prepared.model.named_parameters()}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def scores_of(folder: Path) -> dict[str, Any]:
    """What a run's scores.json says."""
    scores: dict[str, Any] = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    return scores


def nearly(value: Any, *, rel: float | None = None, abs: float = 1e-5) -> Any:
    """The same JSON, whose numbers compare with a tolerance."""
    if isinstance(value, dict):
        return {key: nearly(inner, rel=rel, abs=abs) for key, inner in value.items()}
    if isinstance(value, list):
        return [nearly(inner, rel=rel, abs=abs) for inner in value]
    return pytest.approx(value, rel=rel, abs=abs) if isinstance(value, float) else value


def without_timings(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "examples_per_s"} for line in lines]


def children() -> Any:
    """What starts processes: forks, which have everything imported already; where torch has threads, a fork would hang."""
    return multiprocessing.get_context("fork" if torch.get_num_threads() == 1 else "forkserver")


def until(is_so: Callable[[], object], what: str, most_s: float = 60) -> float:
    """The seconds until something is so."""
    began = time.monotonic()
    while not is_so():
        assert time.monotonic() - began < most_s, what
        time.sleep(0.05)
    return time.monotonic() - began
