"""Mistakes that people make: each ends in one line that names value and place, code 2 (3 for data), and no trace on disk."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import NamedTuple

import pytest

from tests.app.conftest import Cli

pytestmark = pytest.mark.usefixtures("hub_out_of_reach")

# `$name` is what the fixture of that name gives
TRAIN, WITH = "train $files/train.csv --model $bert output.dir=out", "train $files/train.csv --model"
TAGS = "train $files/train.conll --model $bert output.dir=out"
EVALUATE, PREDICT, SWEEP = "evaluate $bert_run", "predict $bert_run", "sweep $bert_run/recipe.toml"
COMBINE, EXPORT, REPORT = "combine $bert_run $bert_run", "export $bert_run --out out --to", "report $bert_run"
BASE = '[model]\nbase = "$bert"\n'
RECIPE = f'{BASE}dtype = "fp32"\n[data]\ntrain = "$files/train.csv"\n[output]\ndir = "out"\n'
ADAPTERS = {"adapters/north/": "$bert_run/adapter", "in.csv": "text,shop\na film,north\na plot,nort\n"}
ROUTED = "predict --adapters adapters --file in.csv"
HEADER = b"text,label\n"
ROWS = b"a film,good\nthe plot,bad\n"


class Mistake(NamedTuple):
    """Words for the command line, files that lie there before, and what the error line must say."""

    name: str
    words: list[str]
    says: tuple[str, ...]
    files: Mapping[str, bytes | str | None]
    code: int


def mistake(words: str, *says: str, code: int = 2, **files: bytes | str | None) -> Mistake:
    return Mistake(words, shlex.split(words), says, files, code)


def knob(word: str, *says: str, code: int = 2) -> Mistake:
    """A mistake in a key=value word."""
    return Mistake(word[:60], [*shlex.split(TRAIN), word], says, {}, code)


def recipe(name: str, lines: str, *says: str, start: str = RECIPE) -> Mistake:
    """A mistake in a recipe."""
    return Mistake(name, ["train", "r.toml"], says, {"r.toml": start + lines}, 2)


def data(name: str, content: bytes, *says: str, file: str = "bad.csv") -> Mistake:
    """A mistake in the training file."""
    return Mistake(name, ["train", file, *shlex.split(TRAIN)[2:]], (file, *says), {file: content}, 3)


def tags(name: str, content: bytes, *says: str) -> Mistake:
    """A mistake in a file of CoNLL columns."""
    return data(name, content, *says, file="bad.conll")


def base(name: str, *says: str, **files: bytes | str) -> Mistake:
    """A mistake in the folder of a base model."""
    return Mistake(name, [*shlex.split(WITH), "base"], ("base", *says), files, 2)


def adapter(command: str, file: str, content: bytes | None, *says: str) -> Mistake:
    """A mistake in the folder of an adapter."""
    files = {"bad/": "$bert_run/adapter", f"bad/{file}": content}
    return Mistake(f"{command} {file}", shlex.split(command), says, files, 2)


MISTAKES = (
    # keys and values
    knob("train.lrr=1e-3", "train.lrr", "did you mean", "'train.lr'"),
    knob("lora.rank=8", "lora.rank", "unknown key"),
    knob("trian.lr=1e-3", "trian.lr=1e-3", "unknown key 'trian'", "did you mean 'train'"),
    knob("train.lr=nan", "train.lr", "nan", "finite"),
    knob("train.lr=-1", "train.lr", "-1", "greater than 0"),
    knob("train.lr=fast", "train.lr", "'fast'", "number"),
    knob("train.epochs=2.5", "train.epochs", "2.5", "whole number"),
    knob("train.epochs=0", "train.epochs", "0", "greater than or equal to 1"),
    knob("train.method=loro", "train.method", "'loro'", "'lora', 'full' or 'head'"),
    knob("train.schedule=step", "train.schedule", "'step'", "'linear', 'cosine' or 'constant'"),
    knob("data.validation_share=1.5", "data.validation_share", "1.5", "less than 1"),
    knob("data.format=xml", "data.format", "'xml'", "csv"),
    knob("train.seed=" + "9" * 5000, "train.seed", "a number of too many digits"),
    knob("train.epochs=" + "9" * 400, "train.epochs: a whole number too large for 64 bits"),
    knob("train.lr=" + "[" * 3000, "train.lr: nested too deep"),
    knob("lora.use_dora=1", "lora.use_dora", "true or false"),
    knob("lora.r=17", "r = 17", "smaller side is 16"),
    knob("lora.target_modules=query,valeu", "target_modules", "'valeu'", "did you mean 'value'"),
    knob("lora.target_modules=3", "lora.target_modules = 3", "a list, for example [a,b]"),
    knob("lora.target_modules=[]", "lora.target_modules is empty", "train.method = 'head'"),
    knob("data.max_length=600", "data.max_length = 600", "at most 64 tokens"),
    knob("data.max_length=4", "data.max_length", "4", "greater than or equal to 8"),
    knob("task.name=poetry", "task.name", "'poetry'", "token_classification"),
    knob("data.label=lable", "data.label = 'lable'", "did you mean 'label'", "train.csv", code=3),
    knob("data.validation=nowhere.csv", "nowhere.csv", "no such file", code=3),
    knob("output.trackers=[tensorbord]", "output.trackers", "'tensorbord'", "'tensorboard'"),
    knob("output.dir=" + "x" * 300, "output.dir = 'xxx", "File name too long"),
    knob("train.lr", "'train.lr'", "section.key=value"),
    knob("lr=1", "'lr=1'", "section.key=value"),
    mistake(f"{TRAIN} model.dtype=bf16 train.method=full", "'bf16'", "train.method = 'full'"),
    mistake("train $files/train.conll --model $t5 task.name=text2text_ner train.method=head", "'head'", "no head"),
    # tasks
    mistake(f"{TRAIN} --task poetry", "--task", "'poetry'", "known: choice, classification"),
    mistake(f"{TRAIN} --task ordinal", "task.order is missing", "bad, good"),
    mistake(f"{TRAIN} --task ordinal task.order=bad,god", "train.csv:", "'good' is not in the order", "'god'", code=3),
    mistake(f"{TRAIN} --task ordinal task.order=bad,bad", "task.order", "each once"),
    mistake(
        f"{TRAIN} --task regression", "train.csv:2, ", ": column 'label' holds 'good', not a finite number", code=3
    ),
    mistake(f"{TRAIN} --task multi-label task.metric=macro_f1", "task.metric = 'macro_f1'", "'macro_f1_at_0.5'"),
    mistake(f"{TRAIN} --task regression task.calibrate=true", "task.calibrate = True belongs to sequence_classificat"),
    mistake(f"{TRAIN} --task regression --label text,label", "data.label names 2 columns", "needs one number"),
    knob("task.metric=f2", "task.metric = 'f2' is not a score of sequence_classification; known: accuracy, brier"),
    knob("task.class_weights=balance", "task.class_weights", "'balance'"),
    knob("task.class_weights={god=2}", "task.class_weights", "'god'", "did you mean 'good'?"),
    knob("task.class_weights={good=-1}", "task.class_weights = -1", "greater than 0"),
    # recipes
    mistake("train recipe.toml", "recipe.toml", "does not exist", "'recipes.toml'", **{"recipes.toml": RECIPE}),
    mistake(
        "train r.toml --epochs 3", "No such option '--epochs'. Settings are written without dashes: train.epochs=VALUE"
    ),
    mistake("train r.toml --head-lr 3", "Settings are written without dashes: train.head_lr=VALUE"),
    mistake("train sst2-bert epochs=3", "write changes as section.key=value, for example train.epochs=3"),
    mistake("sweep a.csv train.lr=1,2", "a.csv: not TOML", **{"a.csv": b"text,label\n"}),
    mistake("train sst2-brt", "'sst2-brt' is neither a file nor a built-in recipe; did you mean 'sst2-bert'"),
    mistake("train recipes/sst2-bert.toml", "does not exist; did you mean 'sst2-bert'"),
    mistake("recipe show sst2-brt", "'sst2-brt' is not a built-in recipe; did you mean 'sst2-bert'"),
    recipe("hexadecimal digits", f"[train]\nseed = 0x{'f' * 5000}\n", "r.toml: train.seed: a whole number"),
    recipe("5,000 digits", f"[train]\nseed = {'9' * 5000}\n", "r.toml: not TOML: line 9: a number of too many"),
    recipe("alpha of 400 digits", f"[lora]\nalpha = {'9' * 400}\n", "lora.alpha: a whole number too large for 64 bits"),
    recipe("layers of huge numbers", f"[lora]\nlayers_to_transform = [0x{'f' * 5000}]\n", "lora.layers_to_transform"),
    recipe("value nested deep", f"[train]\nlr = {'[' * 5000}{']' * 5000}\n", "r.toml: not TOML: nested too deep"),
    recipe("key nested deep", f"[train]\n{'.'.join('a' * 500)} = 1\n", "train.a: nested too deep"),
    recipe("not TOML", "[train\n", "r.toml", "not TOML", "line 8"),
    recipe("unknown section", "[tarin]\nlr = 1\n", "r.toml", "unknown key 'tarin'", "'train'"),
    recipe("unknown key", "[train]\nlearning_rate = 1\n", "r.toml", "'train.learning_rate'; did you mean 'train.lr'?"),
    recipe("section that is a value", "task = 3\n", "r.toml", "output.task"),
    recipe("no base", '[data]\ntrain = "a.csv"\n', "r.toml", "model", "missing", start=""),
    recipe("no data", "", "data.train is missing", start=BASE),
    mistake("train r.toml model.base=x", "r.toml", "model is not a table", **{"r.toml": "model = 3\n"}),
    mistake("train r.toml --text t", "--text", "section.key=value", **{"r.toml": RECIPE}),
    # data
    mistake("train nowhere.csv --model $bert", "nowhere.csv", "no such file", code=3),
    mistake("train reviwes.csv --model $bert", "did you mean 'reviews.csv'", code=3, **{"reviews.csv": HEADER + ROWS}),
    data("empty file", b"", "is empty"),
    data("one label", HEADER + b"a,good\nb,good\nc,good\n", "'good'", "two labels"),
    data("one example", HEADER + b"a,good\n", "a single example cannot be split")._replace(code=2),
    data("ragged", HEADER + b"a,good\nb,bad,worse\n", "bad.csv:3", "3 columns", "the header has 2"),
    data("Latin-1", HEADER + "caf\u00e9,good\n".encode("latin-1"), "bad.csv:2", "0xe9", "UTF-8"),
    data("unknown format", b"hello\nworld\n", "data.format=", file="bad.xyz"),
    mistake(
        f"{TRAIN} data.validation=v.csv",
        *("v.csv:3", "'fair'", "not in the training data"),
        **{"v.csv": HEADER + b"a,good\nb,fair\n"},
        code=3,
    ),
    mistake(f"{TAGS} task.name=sequence_classification", "train.conll", "tagged words", code=3),
    mistake(f"{TRAIN} task.name=token_classification", "train.csv", "needs tagged words", code=3),
    tags("bad tag", b"Ada B-PER\nsaw X-VERB\n", "bad.conll:2", "'X-VERB'", "is not a tag"),
    # base models
    mistake("train $files/train.csv", "train.csv", "--model"),
    mistake(f"{WITH} ./nowhere", "'./nowhere'", "no such folder"),
    mistake(f"{WITH} ./{'x' * 300}", "model.base = './xxx", "File name too long"),
    mistake(f"{WITH} .", "'.'", "no config.json"),
    mistake(f"{WITH} someone/nothing", "'someone/nothing'", "no such model"),
    mistake(f"{WITH} offline/model", "'offline/model'", "cannot be reached"),
    mistake(f"{WITH} 'no id!'", "'no id!'"),
    mistake("train $files/train.conll --model $bert --task text2text", "$bert", "AutoModelForSeq2SeqLM"),
    base(
        "base that holds an adapter",
        *("'base'", "holds an adapter", "lorakit merge"),
        **{"base/config.json": b"{}", "base/adapter_config.json": b"{}"},
    ),
    base("weights cut off", "cannot be loaded", **{"base/": "$bert", "base/model.safetensors": b"\x08\0\0"}),
    base(
        "weights of another shape",
        "cannot be loaded",
        **{"base/": "$bert", "base/config.json": '{"model_type": "bert", "hidden_size": 8, "num_attention_heads": 2}'},
    ),
    base("no weights", ".safetensors", **{"base/config.json": '{"model_type": "bert"}'}),
    base("config is not JSON", "config.json", **{"base/": "$bert", "base/config.json": "{"}),
    base("no architecture", "config.json", **{"base/": "$bert", "base/config.json": '{"model_type": "perceptron"}'}),
    base("tokenizer is damaged", "tokenizer", **{"base/": "$bert", "base/tokenizer.json": "{"}),
    # places
    mistake(TRAIN, "output.dir = 'out'", "exists already", **{"out/mine.txt": b"mine"}),
    mistake(TRAIN, "output.dir = 'out'", "exists already", out=b"mine"),
    mistake(f"{TRAIN} output.dir=file/out", "output.dir = 'file/out'", "cannot be created", file=b""),
    mistake(f"{TRAIN} --resume auto", "'out'", "contains no run", **{"out/mine.txt": b"mine"}),
    mistake(f"{TRAIN} --resume nowhere", "--resume nowhere", "no such checkpoint"),
    mistake(f"{TRAIN} --resume empty", "empty", "complete checkpoint", **{"empty/file": b""}),
    mistake(
        "train $bert_run/recipe.toml train.lr=0.5 --resume auto",
        *("--resume: the recipe changed", "train.lr was 0.02, now 0.5"),
    ),
    # evaluate
    mistake("evaluate nowhere $files/train.csv", "nowhere", "no such run folder"),
    mistake(f"{EVALUATE} nowhere.csv", "nowhere.csv", "no such file", code=3),
    mistake(f"{EVALUATE} $files/train.csv --format cvs", "train.csv", "'cvs'", "did you mean 'csv'", code=3),
    mistake(f"{EVALUATE} $files/train.csv --label lable", "'lable'", "did you mean 'label'", code=3),
    mistake(f"{EVALUATE} v.csv", "v.csv:2", "'godo'", "'good'", code=3, **{"v.csv": HEADER + b"a,godo\n"}),
    # predict
    mistake("predict $files 'a film'", "neither a run folder nor a lorakit adapter"),
    mistake(f"{PREDICT} 'a film' --file t.txt", "either texts or --file", **{"t.txt": b"a\n"}),
    mistake(PREDICT, "either texts or --file"),
    mistake(f"{PREDICT} 'a film' ''", "text 2 of 2 is empty", code=3),
    mistake(f"{PREDICT} --file t.txt --out out.jsonl", "t.txt:2", "empty", code=3, **{"t.txt": b"a\n\nb\n"}),
    mistake(f"{PREDICT} --file t.txt --out out.jsonl", "t.txt", "no such file", code=3),
    mistake(f"{PREDICT} 'a film' --out nowhere/a.jsonl", "--out nowhere/a.jsonl", "does not exist"),
    mistake(f"{PREDICT} a --out there", "--out FOLDER", "--file", "--out NAME.jsonl", **{"there/file": b""}),
    mistake(f"{PREDICT} --file ./a.csv --out a.csv", "--out a.csv", "--file", **{"a.csv": HEADER + ROWS}),
    mistake("predict nowhere a --out a.txt", "--out a.txt: use one of the suffixes .jsonl, .ndjson, .csv, .tsv, .par"),
    mistake(f"{PREDICT} --file 0.parquet 1.parquet --out out", "put patterns in quotes", **{"0.parquet": b""}),
    mistake(
        f"{PREDICT} --file 0.csv --file 1.csv --out a.jsonl",
        "to read 2 files, write to a folder",
        **{"0.csv": b"", "1.csv": b""},
    ),
    mistake(f"{PREDICT} --file a.csv --out a.jsonl --keep id", "--keep only works with --out FOLDER", **{"a.csv": b""}),
    mistake(f"{PREDICT} a --out out", "reads texts from --file"),
    mistake("predict a --merge --adapters adapters", "--merge only works with one RUN", **ADAPTERS),
    mistake("predict --adapters adapters --file in.csv", "--adapter-column for the names", **ADAPTERS),
    mistake(f"{ROUTED} --adapter-column shop", "in.csv:3: no adapter 'nort'; did", code=3, **ADAPTERS),
    mistake(f"{ROUTED} --adapter-column shp", "--adapter-column = 'shp' is not a col", code=3, **ADAPTERS),
    mistake("predict run text --text x", "--text only works with --file"),
    mistake("predict --file a.csv", "Missing argument 'RUN'"),
    adapter("predict bad 'a film'", "lorakit.json", b'{"format": 1}', "bad/lorakit.json", "damaged"),
    adapter("inspect bad", "lorakit.json", b'{"format": 1, "task": {"name": 1}}', "bad/lorakit.json", "damaged"),
    adapter("predict bad a", "adapter_model.safetensors", b"\x08\0\0", "bad/adapter_model.safetensors", "damaged"),
    adapter(
        "predict bad a",
        *("adapter_config.json", b'{"peft_type": "LORA", "lora_alpha": 9999}'),
        *("bad/adapter_config.json", "changed since it was written"),
    ),
    adapter("predict bad a", "adapter_config.json", None, "adapter_config.json"),
    # what is written for others
    mistake("merge $bert_run --out there", "--out there", "exists already", **{"there/file": b""}),
    mistake("merge $bert_run --out file/out", "file/out", "cannot be written", file=b""),
    mistake("merge $bert_run", "--out"),
    mistake("inspect ./nowhere", "./nowhere", "no such folder"),
    mistake("card nowhere", "nowhere", "no such run folder"),
    mistake("card half", "half", "no scores.json", **{"half/recipe.toml": RECIPE}),
    mistake("push nowhere you/reviews", "nowhere", "no such run folder"),
    mistake("push $bert_run 'a b/c'", "'a b/c'", "NAMESPACE/NAME"),
    mistake("push $bert_run you/reviews", "HF_HUB_OFFLINE", "unset it"),
    mistake(f"{EXPORT} vlm", "--to", "'vlm'", "vllm"),
    mistake("export $bert_run --to peft --out file/out --dry-run", "file/out", "is not a folder", file=b""),
    mistake(f"{EXPORT} merged --int8", "--int8 only works with --to onnx, not with --to merged"),
    mistake(f"{EXPORT} peft --int8", "--int8 only works with --to onnx, not with --to peft"),
    mistake(f"{EXPORT} onnx --rank 2", "--rank and --base-name only work with adapters, not with --to onnx"),
    mistake(f"{EXPORT} merged --base-name a/b", "not with --to merged"),
    mistake("import empty --out out", "empty", **{"empty/file": b""}),
    # the other commands
    mistake("check nowhere.csv", "nowhere.csv", "no such file", code=3),
    mistake(
        "check bad.csv", "bad.csv:2: 1 columns, the header has 2: text, label", code=3, **{"bad.csv": HEADER + b"b"}
    ),
    mistake("check nowhere.toml", "recipe nowhere.toml does not exist"),
    mistake("check a.csv data.lable=x", "unknown key 'data.lable'; did you mean 'data.label'", **{"a.csv": HEADER}),
    mistake("check $files/train.csv --run $bert_run --task ner", "use either --task or --run"),
    mistake(
        "check r.toml --run $tagger_run", "was trained for token_classification, but the data", **{"r.toml": RECIPE}
    ),
    mistake("compare $bert_run", "compare", "two"),
    mistake("report nowhere", "nowhere", "no such run folder"),
    mistake("report .", ".: no scores.json; the run is not finished"),
    mistake(f"{REPORT} --out there", "--out there", "report.html", **{"there/a": ""}),
    mistake(f"{REPORT} --out no/page.html", "--out no/page.html: its folder does not exist"),
    mistake(f"{COMBINE} --weights a,b", "'a,b'", "0.7,0.3"),
    mistake(f"{COMBINE} --weights 1,1,1", "--weights: 3 weights for 2 runs"),
    mistake("combine $bert_run $tagger_run --weights 1,1", "its task.name is 'token_classification', but that of"),
    mistake("combine $bert_run --weights 1", "at least two runs"),
    mistake("serve $bert_run --host 0.0.0.0", "--host 0.0.0.0", "set --token"),
    mistake("serve $bert_run --token naïve", "visible ASCII"),
    mistake("serve $bert_run --port 70000", "70000 is not in the range"),
    mistake("serve nowhere --dry-run", "nowhere"),
    mistake(f"{SWEEP} output.dir=out", "sweep"),
    mistake(f"{SWEEP} output.dir=a,b", "output.dir"),
    mistake("sweep r.toml --seeds a", "--seeds", "0,1,2"),
    mistake("completion tcsh", "'tcsh'", "bash"),
    # the command line itself
    mistake("trian x", "'trian'"),
    mistake(f"{TRAIN} --epochs 3", "--epochs"),
    mistake("train", "DATA|RECIPE"),
    mistake("quickstart sentiment --t5", "--t5 only works with ner"),
    mistake("quickstart poetry", "'poetry'"),
)


class Fixtures(dict[str, str]):
    """What fixtures give, by their names."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self.request = request

    def __missing__(self, name: str) -> str:
        return str(self.request.getfixturevalue(name))

    def fill(self, text: str) -> str:
        return Template(text).safe_substitute(self)


def lay(folder: Path, content: Mapping[str, bytes | str | None], fixtures: Fixtures) -> None:
    """Write a mistake's files: `name/` is a folder of links to another's files, None takes one away."""
    for name, value in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir()
            for source in Path(fixtures.fill(str(value))).iterdir():
                (path / source.name).symlink_to(source)
            continue
        path.unlink(missing_ok=True)
        if value is not None:
            path.write_bytes(value if isinstance(value, bytes) else fixtures.fill(value).encode())


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_mistake_ends_in_one_line(cli: Cli, request: pytest.FixtureRequest, tmp_path: Path, mistake: Mistake) -> None:
    fixtures = Fixtures(request)
    lay(tmp_path, mistake.files, fixtures)
    before = tree(tmp_path)
    code, out, err = cli(*map(fixtures.fill, mistake.words))
    *notes, line = err.splitlines()
    assert line.startswith("error: "), err
    assert not any(note.startswith("error") for note in notes)
    assert "Traceback" not in err
    for part in mistake.says:
        assert fixtures.fill(part) in line
    assert (code, out) == (mistake.code, "")
    assert tree(tmp_path) == before


def test_debug_shows_the_traceback(cli: Cli) -> None:
    code, _, err = cli("--debug", "train", "nowhere.csv", "--model", "minilm")
    assert code == 3
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            RuntimeError("first\nsecond"),
            (1, "error: RuntimeError: first (this is a bug in lorakit; --debug shows where)\n"),
        ),
        (KeyboardInterrupt(), (130, "\nerror: interrupted\n")),  # the terminal's ^C stands before the line break
    ],
)
def test_faults_and_interrupts_end_in_one_line(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, error: BaseException, expected: tuple[int, str]
) -> None:
    def broken(*arguments: object) -> bool:
        raise error

    monkeypatch.setattr("lorakit.data.read.holds_words", broken)
    assert cli("train", "a.csv", "--model", "x")[::2] == expected
