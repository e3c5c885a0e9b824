"""Both reference recipes to the end against a hub on this machine, which has their models and data in their true formats."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import datasets
import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, Value
from safetensors.torch import load_file, save_file

from tests.fake_hub import TOKEN, Hub, Repo, serving
from tests.runs import PEOPLE, PLACES, SPECIAL, WORDS, reviews, scores_of

pytestmark = pytest.mark.slow

TAGS = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC")
CARD = """---
configs:
{configs}
---
# GLUE
"""
DRIVER = """
import contextlib, io, json, sys, traceback
from lorakit.app.cli import main
for line in sys.stdin:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(json.loads(line)); code = 0
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            code = -1; traceback.print_exc()
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


class Answer(NamedTuple):
    code: int
    out: str
    err: str


def bert_base(folder: Path) -> Path:
    """BERT as its checkpoint is on the hub: with the heads of pre-training, and LayerNorm's old names."""
    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=len(vocabulary), **sizes, initializer_range=0.2)
    transformers.BertForPreTraining(config).save_pretrained(folder)
    transformers.BertTokenizerFast(vocab=vocabulary).save_pretrained(folder)
    file = folder / "model.safetensors"
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    state = {
        next((key.replace(new, was) for new, was in old.items() if key.endswith(new)), key): value.clone()
        for key, value in load_file(file).items()
    }
    file.unlink()
    save_file(state, file, metadata={"format": "pt"})
    return folder


def t5_small(folder: Path) -> Path:
    """T5 of three blocks, with a unigram tokenizer of a hundred sentinels."""
    torch.manual_seed(0)
    sentinels = [(f"<extra_id_{i}>", 0.0) for i in range(99, -1, -1)]
    words = [("\u2581" + word, -3.0) for word in (*WORDS, *PEOPLE, *PLACES, "ner", "PER", "LOC")]
    pieces = [(chr(c), -8.0) for c in range(33, 127)] + [("\u2581", -6.0)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *words, *pieces, *sentinels]
    transformers.T5TokenizerFast(vocab=vocabulary).save_pretrained(folder)
    sizes = {"d_model": 24, "d_kv": 12, "d_ff": 48, "num_layers": 3, "num_heads": 2}
    config = transformers.T5Config(vocab_size=len(vocabulary), **sizes, decoder_start_token_id=0)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def glue(folder: Path) -> Path:
    """SST-2 as GLUE has it: sentence, label, idx in Parquet; a test split whose labels are -1; a second data set beside it."""
    label = ClassLabel(names=["negative", "positive"])
    features = Features({"sentence": Value("string"), "label": label, "idx": Value("int32")})
    for split, n in {"train": 64, "validation": 24, "test": 8}.items():
        rows = [(text, -1 if split == "test" else int(kind == "good")) for text, kind in reviews(n, seed=n)]
        columns = {"sentence": [t for t, _ in rows], "label": [x for _, x in rows], "idx": list(range(n))}
        for name in ("sst2", "cola"):
            (folder / name).mkdir(parents=True, exist_ok=True)
            Dataset.from_dict(columns, features).to_parquet(folder / name / f"{split}-00000-of-00001.parquet")
    configs = [
        f"- config_name: {name}\n  data_files:\n"
        + "\n".join(f"  - split: {s}\n    path: {name}/{s}-*" for s in ("train", "validation", "test"))
        for name in ("cola", "sst2")
    ]
    (folder / "README.md").write_text(CARD.format(configs="\n".join(configs)))
    return folder


def conll(folder: Path) -> Path:
    """CoNLL-2003 as the branch that the hub converts has it: no card, tags as class numbers."""
    chance = random.Random(0)
    tags = datasets.List(ClassLabel(names=list(TAGS)))
    words = datasets.List(Value("string"))
    features = Features({"id": Value("string"), "tokens": words, "ner_tags": tags})
    for split, n in {"train": 24, "validation": 8, "test": 8}.items():
        rows = [([chance.choice(PEOPLE), "saw", chance.choice(PLACES), "."], [1, 0, 5, 0]) for _ in range(n)]
        columns = {"id": [str(i) for i in range(n)], "tokens": [w for w, _ in rows], "ner_tags": [t for _, t in rows]}
        (folder / "conll2003" / split).mkdir(parents=True)
        Dataset.from_dict(columns, features).to_parquet(folder / "conll2003" / split / "0000.parquet")
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    (root / "empty").mkdir()
    with serving() as hub:
        hub.repos = {
            "bert-base-uncased": Repo({"main": bert_base(root / "bert")}),
            "t5-small": Repo({"main": t5_small(root / "t5")}),
            "datasets/nyu-mll/glue": Repo({"main": glue(root / "glue")}),
            "datasets/eriktks/conll2003": Repo({"main": root / "empty", "refs/convert/parquet": conll(root / "conll")}),
            "datasets/somebody/gated": Repo({"main": root / "glue"}, gated=True),
            "datasets/somebody/empty": Repo({"main": root / "empty"}),
        }
        yield hub


class Lorakit:
    """A process of its own that runs commands, since libraries read the environment once."""

    def __init__(self, hub: Hub, home: Path, **more: str) -> None:
        env = {**os.environ, **hub.env(home), "OMP_NUM_THREADS": "1", **more}
        pipe = subprocess.PIPE
        command = [sys.executable, "-c", DRIVER]
        self.process = subprocess.Popen(command, env=env, cwd=home, stdin=pipe, stdout=pipe, text=True)

    def __call__(self, *words: object) -> Answer:
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps([str(word) for word in words]), file=self.process.stdin, flush=True)
        return Answer(*json.loads(self.process.stdout.readline()))

    def __enter__(self) -> Lorakit:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()


def test_reference_recipes_run_to_the_end_and_again_offline(hub: Hub, tmp_path: Path) -> None:
    small = ("task.max_target_length=12", "train.epochs=2")
    with Lorakit(hub, tmp_path) as lorakit:
        for recipe, words in {"sst2-bert": (), "conll-t5": small}.items():
            done = lorakit("train", recipe, *words)
            assert done.code == 0, done.err
            scores = scores_of(tmp_path / "runs" / recipe)
            assert scores["best_step"] > 0
            assert (tmp_path / "runs" / recipe / "report.html").exists()
        adapter = load_file(tmp_path / "runs" / "conll-t5" / "adapter" / "adapter_model.safetensors")
        assert len(adapter) == 2 * 2 * 2, "A and B of q and v of the encoder's blocks 1 and 2 alone"
    hub.asked.clear()
    with Lorakit(hub, tmp_path, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1") as lorakit:
        done = lorakit("train", "sst2-bert", "output.dir=runs/again", "train.max_steps=1")
        assert done.code == 0, done.err
        done = lorakit("predict", "runs/sst2-bert", "a superb film")
        assert done.code == 0, done.err
    assert hub.asked == []


OUTCOMES = {
    "nobody/nothing": "nobody/nothing: no such file, and the data set cannot be loaded from the hub: ",
    "nyu-mll/glue:sst2@v9": "nyu-mll/glue:sst2@v9: no such file, and the data set cannot be loaded from the hub: ",
    "nyu-mll/glue:sst9": "nyu-mll/glue:sst9: ",
    "nyu-mll/glue:sst2#trian": "nyu-mll/glue:sst2#trian: no split 'trian'; did you mean 'train'?",
    "nyu-mll/glue:sst2#test": "nyu-mll/glue:sst2#test:1, 2, 3, 4, 5, 6, 7, 8: column 'label' holds None, not a label",
    "somebody/gated:sst2": "somebody/gated:sst2: no such file, and the data set cannot be loaded from the hub: ",
    "somebody/empty": "somebody/empty: no such file, and the data set cannot be loaded from the hub: ",
}


def test_what_a_hub_does_not_give_of_data_is_told_in_a_line(hub: Hub, tmp_path: Path) -> None:
    with Lorakit(hub, tmp_path) as lorakit:
        for source, message in OUTCOMES.items():
            done = lorakit("check", source)
            line = done.err.strip()
            assert (done.code, line.count("\n")) == (3, 0), done.err
            assert message in line
            assert "Traceback" not in line
        hub.down = 500
        done = lorakit("check", "nyu-mll/glue:cola")
        hub.down = 0
        assert done.err.strip().endswith("not in its cache, and the hub cannot be reached")
        assert (done.code, done.err.strip().count("\n")) == (3, 0)
    with Lorakit(hub, tmp_path, HF_TOKEN=TOKEN) as lorakit:
        assert lorakit("check", "somebody/gated:sst2#train").code == 0
