"""Mistakes that people make: each ends in one line that names value and place, code 2 (3 for data), and no trace on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.app.conftest import Cli

pytestmark = pytest.mark.usefixtures("hub_out_of_reach")

TRAIN = ("train", "{files}/train.csv", "--model", "{bert}", "output.dir=out")
TAGS = ("train", "{files}/train.conll", "--model", "{bert}", "output.dir=out")
RECIPE = '[model]\nbase = "{bert}"\ndtype = "fp32"\n[data]\ntrain = "{files}/train.csv"\n[output]\ndir = "out"\n'
DATA = ("train", "bad.csv", "--model", "{bert}", "output.dir=out")
HEADER = b"text,label\n"
ROWS = b"a film,good\nthe plot,bad\n"


@dataclass(frozen=True)
class Mistake:
    """Words for the command line, files that lie there before, and what the error line must say."""

    name: str
    words: tuple[str, ...]
    says: tuple[str, ...]
    files: Mapping[str, bytes | str] = field(default_factory=dict)
    code: int = 2


def data(name: str, content: bytes, *says: str) -> Mistake:
    """A mistake in the training file."""
    return Mistake(name, DATA, ("bad.csv", *says), {"bad.csv": content}, 3)


def tags(name: str, content: bytes, *says: str) -> Mistake:
    """A mistake in a file of CoNLL columns."""
    return Mistake(name, ("train", "bad.conll", *DATA[2:]), ("bad.conll", *says), {"bad.conll": content}, 3)


def recipe(name: str, lines: str, *says: str) -> Mistake:
    """A mistake in a recipe."""
    return Mistake(name, ("train", "r.toml"), says, {"r.toml": RECIPE + lines})


def knob(word: str, *says: str) -> Mistake:
    """A mistake in a key=value word."""
    return Mistake(word, (*TRAIN, word), says)


MISTAKES = (
    # keys and values
    knob("train.lrr=1e-3", "train.lrr", "did you mean", "'train.lr'"),
    knob("lora.rank=8", "lora.rank", "unknown key"),
    knob("trian.lr=1e-3", "trian.lr=1e-3", "unknown key 'trian'", "did you mean 'train'"),
    knob("train.lr=nan", "train.lr", "nan", "finite"),
    knob("train.lr=inf", "train.lr", "inf", "finite"),
    knob("train.lr=-1", "train.lr", "-1", "greater than 0"),
    knob("train.lr=fast", "train.lr", "'fast'", "number"),
    knob("train.epochs=2.5", "train.epochs", "2.5", "integer"),
    knob("train.epochs=0", "train.epochs", "0", "greater than or equal to 1"),
    knob("train.method=loro", "train.method", "'loro'", "'lora', 'full' or 'head'"),
    knob("train.schedule=step", "train.schedule", "'step'", "'linear', 'cosine' or 'constant'"),
    knob("data.validation_share=1.5", "data.validation_share", "1.5", "less than 1"),
    knob("data.format=xml", "data.format", "'xml'", "csv"),
    knob("model.dropout=1", "model.dropout", "less than 1"),
    knob("train.seed=" + "9" * 5000, "train.seed", "a number of too many digits"),
    knob("train.epochs=" + "9" * 400, "train.epochs: a whole number beyond 64 bits"),
    knob("train.lr=" + "[" * 3000, "train.lr: nested too deep"),
    knob("lora.use_dora=1", "lora.use_dora", "boolean"),
    knob("lora.r=0", "lora.r", "0", "greater than or equal to 1"),
    knob("lora.r=17", "r = 17", "smaller side is 16"),
    knob("lora.init=pizza", "'pizza'", "did you mean 'pissa'"),
    knob("lora.target_modules=qurey", "target_modules", "'qurey'", "did you mean 'query'"),
    knob("lora.target_modules=query,valeu", "target_modules", "'valeu'", "did you mean 'value'"),
    knob("lora.target_modules=.*qurey", "target_modules", "'.*qurey'", "matches no whole path"),
    knob("lora.target_modules=(", "target_modules", "'('", "not a regular expression"),
    knob("lora.target_modules=3", "lora.target_modules = 3", "a list, for example [a,b]"),
    knob("lora.target_modules=[qurey,value]", "'qurey'", "did you mean 'query'"),
    knob("lora.target_modules=[]", "lora.target_modules is empty", "train.method = 'head'"),
    knob("lora.layers_to_transform=7", "layers_to_transform", "7"),
    knob("lora.layers_to_transform=[7]", "layers_to_transform", "block 7", "blocks: 0 to 1"),
    knob('lora.modules_to_save=["clasifier"]', "modules_to_save", "'clasifier'", "did you mean 'classifier'"),
    knob("lora.rank_pattern={qurey=2}", "rank_pattern", "'qurey'", "did you mean 'query'"),
    knob("data.max_length=600", "data.max_length = 600", "64 tokens at most"),
    knob("data.max_length=4", "data.max_length", "4", "greater than or equal to 8"),
    knob("task.name=poetry", "task.name", "'poetry'", "token_classification"),
    knob("data.label=lable", "data.label = 'lable'", "did you mean 'label'", "train.csv"),
    knob("data.validation=nowhere.csv", "nowhere.csv", "no such file"),
    Mistake("bf16 with full", (*TRAIN, "model.dtype=bf16", "train.method=full"), ("'bf16'", "train.method = 'full'")),
    Mistake(
        "head of a T5",
        (*TAGS[:3], "{t5}", TAGS[4], "task.name=text2text_ner", "train.method=head"),
        ("'head'", "no head"),
    ),
    Mistake("no equals sign", (*TRAIN, "train.lr"), ("'train.lr'", "section.key=value")),
    Mistake("no section", (*TRAIN, "lr=1"), ("'lr=1'", "section.key=value")),
    # recipes
    Mistake(
        "missing recipe",
        ("train", "recipe.toml"),
        ("recipe.toml", "does not exist", "'recipes.toml'"),
        {"recipes.toml": RECIPE},
    ),
    recipe(
        "seed of 5,000 hexadecimal digits", f"[train]\nseed = 0x{'f' * 5000}\n", "r.toml: train.seed: a whole number"
    ),
    recipe("seed of 5,000 digits", f"[train]\nseed = {'9' * 5000}\n", "r.toml: not TOML: line 9: a number of too many"),
    recipe("alpha of 400 digits", f"[lora]\nalpha = {'9' * 400}\n", "lora.alpha: a whole number beyond 64 bits"),
    recipe("layers of huge numbers", f"[lora]\nlayers_to_transform = [0x{'f' * 5000}]\n", "lora.layers_to_transform"),
    recipe("value nested deep", f"[train]\nlr = {'[' * 5000}{']' * 5000}\n", "r.toml: not TOML: nested too deep"),
    recipe("key nested deep", f"[train]\n{'.'.join('a' * 500)} = 1\n", "train.a: nested too deep"),
    recipe("not TOML", "[train\n", "r.toml", "not TOML", "line 8"),
    recipe("unknown section", "[tarin]\nlr = 1\n", "r.toml", "unknown key 'tarin'", "'train'"),
    recipe("unknown key", "[train]\nlearning_rate = 1\n", "r.toml", "unknown key 'train.learning_rate'"),
    recipe("section that is a value", "task = 3\n", "r.toml", "output.task"),
    Mistake(
        "value for a section",
        ("train", "r.toml", "model.base=x"),
        ("r.toml", "model is no table"),
        {"r.toml": "model = 3\n"},
    ),
    Mistake("no base", ("train", "r.toml"), ("r.toml", "model", "missing"), {"r.toml": '[data]\ntrain = "a.csv"\n'}),
    Mistake("no data", ("train", "r.toml"), ("data.train is missing",), {"r.toml": '[model]\nbase = "{bert}"\n'}),
    Mistake(
        "option with a recipe", ("train", "r.toml", "--text", "t"), ("--text", "section.key=value"), {"r.toml": RECIPE}
    ),
    # data
    Mistake("missing file", ("train", "nowhere.csv", "--model", "{bert}"), ("nowhere.csv", "no such file")),
    Mistake(
        "missing file with a near one",
        ("train", "reviwes.csv", "--model", "{bert}"),
        ("did you mean 'reviews.csv'",),
        {"reviews.csv": HEADER + ROWS},
    ),
    data("empty file", b"", "is empty"),
    data("header only", HEADER, "no record"),
    data("one label", HEADER + b"a,good\nb,good\nc,good\n", "'good'", "two labels"),
    Mistake("one example", DATA, ("bad.csv", "one example cannot be split"), {"bad.csv": HEADER + b"a,good\n"}),
    data("no label column", b"text,verdict\na,good\nb,bad\n", "label", "data.label=NAME", "verdict"),
    data("ragged", HEADER + b"a,good\nb,bad,worse\n", "bad.csv:3", "3 columns", "the header has 2"),
    data("open quote", HEADER + b'a,good\n"b,bad\n', "bad.csv", "not valid CSV"),
    data("Latin-1", HEADER + "caf\u00e9,good\n".encode("latin-1"), "bad.csv:2", "0xe9", "UTF-8"),
    data("UTF-16", (HEADER + ROWS).decode().encode("utf-16"), "UTF-16"),
    data("NUL", HEADER + b"a\0,good\nb,bad\n", "bad.csv:2", "NUL"),
    data("empty text", HEADER + b"a,good\n ,bad\n", "bad.csv:3", "'text'", "empty"),
    data("empty label", HEADER + b"a,good\nb,\n", "bad.csv:3", "'label'"),
    data("column twice", b"text,text\na,b\n", "bad.csv:1", "twice"),
    Mistake(
        "label only in validation",
        (*TRAIN, "data.validation=v.csv"),
        ("v.csv:3", "'fair'", "not in the training data"),
        {"v.csv": HEADER + b"a,good\nb,fair\n"},
    ),
    Mistake(
        "bad JSON",
        ("train", "bad.jsonl", *DATA[2:]),
        ("bad.jsonl:2", "not JSON"),
        {"bad.jsonl": '{{"text": "a", "label": "b"}}\n{{"text"\n'},
    ),
    Mistake("no Parquet", ("train", "bad.parquet", *DATA[2:]), ("bad.parquet", "no Parquet"), {"bad.parquet": b"PAR?"}),
    Mistake(
        "unknown format", ("train", "bad.xyz", *DATA[2:]), ("bad.xyz", "data.format="), {"bad.xyz": b"hello\nworld\n"}
    ),
    Mistake("tags for a classifier", (*TAGS, "task.name=sequence_classification"), ("train.conll", "tagged words")),
    Mistake("texts for a tagger", (*TRAIN, "task.name=token_classification"), ("train.csv", "needs tagged words")),
    tags("bad tag", b"Ada B-PER\nsaw X-VERB\n", "bad.conll:2", "'X-VERB'", "is not a tag"),
    tags("number of columns", b"Ada B-PER\nsaw her O\n", "bad.conll:2", "3 columns"),
    tags("no entity", b"a O\nb O\n\nc O\n", "no entity"),
    # base models
    Mistake("no model option", ("train", "{files}/train.csv"), ("train.csv", "--model")),
    Mistake("no such folder", (*TRAIN[:3], "./nowhere"), ("'./nowhere'", "no such folder")),
    Mistake("long output.dir", (*TRAIN[:-1], "output.dir=" + "x" * 300), ("output.dir = 'xxx", "File name too long")),
    Mistake("name of no folder", (*TRAIN[:3], "./" + "x" * 300), ("model.base = './xxx", "File name too long")),
    Mistake(
        "base that holds an adapter",
        (*TRAIN[:3], "base"),
        ("'base'", "holds an adapter", "lorakit merge"),
        {"base/config.json": b"{}", "base/adapter_config.json": b"{}"},
    ),
    Mistake("folder without model", (*TRAIN[:3], "."), ("'.'", "no config.json")),
    Mistake("hub has no such model", (*TRAIN[:3], "someone/nothing"), ("'someone/nothing'", "no such model")),
    Mistake("hub out of reach", (*TRAIN[:3], "offline/model"), ("'offline/model'", "cannot be reached")),
    Mistake("no hub id", (*TRAIN[:3], "no id!"), ("'no id!'",)),
    Mistake(
        "BERT as text to text",
        ("train", "{files}/train.conll", "--model", "{bert}", "--task", "text2text"),
        ("{bert}", "AutoModelForSeq2SeqLM"),
    ),
    Mistake(
        "weights cut off",
        ("train", "{files}/train.csv", "--model", "cut"),
        ("cut", "cannot be loaded"),
        {"cut/": "{bert}", "cut/model.safetensors": b"\x08\0\0"},
    ),
    Mistake(
        "weights of another shape",
        ("train", "{files}/train.csv", "--model", "odd"),
        ("odd", "cannot be loaded"),
        {"odd/": "{bert}", "odd/config.json": '{{"model_type": "bert", "hidden_size": 8, "num_attention_heads": 2}}'},
    ),
    Mistake(
        "no weights",
        ("train", "{files}/train.csv", "--model", "bare"),
        ("bare", ".safetensors"),
        {"bare/config.json": '{{"model_type": "bert"}}'},
    ),
    Mistake(
        "config is not JSON",
        ("train", "{files}/train.csv", "--model", "bad"),
        ("bad", "config.json"),
        {"bad/": "{bert}", "bad/config.json": "{{"},
    ),
    Mistake(
        "unknown architecture",
        ("train", "{files}/train.csv", "--model", "bad"),
        ("bad", "config.json"),
        {"bad/": "{bert}", "bad/config.json": '{{"model_type": "perceptron"}}'},
    ),
    Mistake(
        "tokenizer is damaged",
        ("train", "{files}/train.csv", "--model", "bad"),
        ("bad", "tokenizer"),
        {"bad/": "{bert}", "bad/tokenizer.json": "{{"},
    ),
    Mistake("unknown task", (*TRAIN[:4], "--task", "poetry"), ("--task", "'poetry'", "known: classification")),
    # places
    Mistake("output exists", TRAIN, ("output.dir = 'out'", "exists already"), {"out/mine.txt": b"mine"}),
    Mistake("output is a file", TRAIN, ("output.dir = 'out'", "exists already"), {"out": b"mine"}),
    Mistake(
        "output below a file",
        (*TRAIN[:4], "output.dir=file/out"),
        ("output.dir = 'file/out'", "cannot be made"),
        {"file": b""},
    ),
    Mistake("resume of no run", (*TRAIN, "--resume", "auto"), ("'out'", "holds no run"), {"out/mine.txt": b"mine"}),
    Mistake("resume from nowhere", (*TRAIN, "--resume", "nowhere"), ("--resume nowhere", "no such checkpoint")),
    Mistake(
        "resume from no checkpoint",
        (*TRAIN, "--resume", "empty"),
        ("empty", "no whole checkpoint"),
        {"empty/file": b""},
    ),
    Mistake("evaluate a missing run", ("evaluate", "nowhere", "{files}/train.csv"), ("nowhere", "no such run folder")),
    Mistake("evaluate on missing data", ("evaluate", "{run}", "nowhere.csv"), ("nowhere.csv", "no such file")),
    Mistake(
        "evaluate with an unknown format",
        ("evaluate", "{run}", "{files}/train.csv", "--format", "cvs"),
        ("train.csv", "'cvs'", "did you mean 'csv'"),
    ),
    Mistake(
        "evaluate with a wrong column",
        ("evaluate", "{run}", "{files}/train.csv", "--label", "lable"),
        ("'lable'", "did you mean 'label'"),
    ),
    Mistake(
        "evaluate with an unknown label",
        ("evaluate", "{run}", "v.csv"),
        ("v.csv:2", "'godo'", "did you mean 'good'"),
        {"v.csv": HEADER + b"a,godo\n"},
    ),
    Mistake("predict on no run", ("predict", "{files}", "a film"), ("neither a run folder nor an adapter",)),
    Mistake(
        "texts and a file",
        ("predict", "{run}", "a film", "--file", "t.txt"),
        ("either texts or --file",),
        {"t.txt": b"a\n"},
    ),
    Mistake("neither text nor file", ("predict", "{run}"), ("either texts or --file",)),
    Mistake("empty text to predict", ("predict", "{run}", "a film", ""), ("text 2 of 2 is empty",)),
    Mistake(
        "empty line to predict",
        ("predict", "{run}", "--file", "t.txt", "--out", "out.jsonl"),
        ("t.txt:2", "empty"),
        {"t.txt": b"a\n\nb\n"},
    ),
    Mistake(
        "missing file to predict",
        ("predict", "{run}", "--file", "t.txt", "--out", "out.jsonl"),
        ("t.txt", "No such file"),
    ),
    Mistake(
        "answers to a missing folder",
        ("predict", "{run}", "a film", "--out", "nowhere/a.jsonl"),
        ("--out nowhere/a.jsonl", "does not exist"),
    ),
    Mistake(
        "answers to a folder",
        ("predict", "{run}", "a film", "--out", "there"),
        ("--out FOLDER", "--file", "--out NAME.jsonl"),
        {"there/file": b""},
    ),
    Mistake(
        "answers over the texts",
        ("predict", "{run}", "--file", "./texts.csv", "--out", "texts.csv"),
        ("--out texts.csv", "--file"),
        {"texts.csv": HEADER + ROWS},
    ),
    Mistake(
        "damaged side file",
        ("predict", "bad", "a film"),
        ("bad/lorakit.json", "damaged"),
        {"bad/": "{run}/adapter", "bad/lorakit.json": b'{{"format": 1}}'},
    ),
    Mistake(
        "side file of another task",
        ("inspect", "bad"),
        ("bad/lorakit.json", "damaged"),
        {"bad/": "{run}/adapter", "bad/lorakit.json": b'{"format": 1, "task": {"name": 1}, "dtype": "fp32"}'},
    ),
    Mistake(
        "adapter cut off",
        ("predict", "bad", "a film"),
        ("bad/adapter_model.safetensors", "damaged"),
        {"bad/": "{run}/adapter", "bad/adapter_model.safetensors": b"\x08\0\0"},
    ),
    Mistake(
        "adapter settings edited",
        ("predict", "bad", "a film"),
        ("bad/adapter_config.json", "changed since it was written"),
        {"bad/": "{run}/adapter", "bad/adapter_config.json": b'{"peft_type": "LORA", "lora_alpha": 9999}'},
    ),
    Mistake(
        "adapter without config",
        ("predict", "bad", "a film"),
        ("adapter_config.json",),
        {"bad/": "{run}/adapter", "bad/adapter_config.json": None},
    ),
    Mistake(
        "merge over something",
        ("merge", "{run}", "--out", "there"),
        ("--out there", "exists already"),
        {"there/file": b""},
    ),
    Mistake(
        "merge below a file", ("merge", "{run}", "--out", "file/out"), ("file/out", "cannot be written"), {"file": b""}
    ),
    Mistake("merge without --out", ("merge", "{run}"), ("--out",)),
    Mistake("inspect nothing", ("inspect", "./nowhere"), ("./nowhere", "no such folder")),
    # trackers, cards and the hub
    knob("output.trackers=[tensorbord]", "output.trackers", "'tensorbord'", "'tensorboard'"),
    knob("output.trackers=aim", "output.trackers", "'aim'", "tensorboard"),
    Mistake("card of no run", ("card", "nowhere"), ("nowhere", "no such run folder")),
    Mistake("card of an unfinished run", ("card", "half"), ("half", "no scores.json"), {"half/recipe.toml": RECIPE}),
    Mistake("push of no run", ("push", "nowhere", "you/reviews"), ("nowhere", "no such run folder")),
    Mistake("push to no repository", ("push", "{run}", "a b/c"), ("'a b/c'", "NAMESPACE/NAME")),
    Mistake("push without a network", ("push", "{run}", "you/reviews"), ("HF_HUB_OFFLINE", "unset it")),
    # the other verbs
    Mistake("check missing data", ("check", "nowhere.csv"), ("nowhere.csv", "no such file")),
    Mistake("compare one run", ("compare", "{run}"), ("compare", "two")),
    Mistake("report of no run", ("report", "nowhere"), ("nowhere", "no such run folder")),
    Mistake(
        "report into a folder", ("report", "{run}", "--out", "there"), ("--out there", "report.html"), {"there/a": ""}
    ),
    Mistake("export to nobody", ("export", "{run}", "--to", "vlm", "--out", "out"), ("--to", "'vlm'", "vllm")),
    Mistake(
        "rehearsed export below a file",
        ("export", "{run}", "--to", "peft", "--out", "file/out", "--dry-run"),
        ("file/out", "is not a folder"),
        {"file": b""},
    ),
    Mistake("import of no adapter", ("import", "empty", "--out", "out"), ("empty",), {"empty/file": b""}),
    Mistake("combine without weights", ("combine", "{run}", "{run}"), ("--weights", "--on")),
    Mistake("combine with words", ("combine", "{run}", "{run}", "--weights", "a,b"), ("'a,b'", "0.7,0.3")),
    Mistake("serve to strangers", ("serve", "{run}", "--host", "0.0.0.0"), ("--host 0.0.0.0", "--token")),
    Mistake("serve no run", ("serve", "nowhere", "--dry-run"), ("nowhere",)),
    Mistake("sweep over nothing", ("sweep", "{run}/recipe.toml", "output.dir=out"), ("sweep",)),
    Mistake("sweep over the folder", ("sweep", "{run}/recipe.toml", "output.dir=a,b"), ("output.dir",)),
    Mistake("sweep with words for seeds", ("sweep", "r.toml", "--seeds", "a"), ("--seeds", "0,1,2")),
    Mistake("completion of another shell", ("completion", "tcsh"), ("'tcsh'", "bash")),
    # the command line itself
    Mistake("unknown command", ("trian", "x"), ("'trian'",)),
    Mistake("unknown option", (*TRAIN, "--epochs", "3"), ("--epochs",)),
    Mistake("missing argument", ("train",), ("WHAT",)),
    Mistake("t5 of sentiment", ("quickstart", "sentiment", "--t5"), ("--t5 goes with ner",)),
    Mistake("unknown quickstart", ("quickstart", "poetry"), ("'poetry'",)),
)


@pytest.fixture
def places(bert: Path, t5: Path, files: Path, bert_run: Path) -> dict[str, str]:
    return {"bert": str(bert), "t5": str(t5), "files": str(files), "run": str(bert_run)}


def lay(folder: Path, content: Mapping[str, bytes | str | None], places: Mapping[str, str]) -> None:
    """Write a mistake's files: `name/` is a folder of links to another's files, None takes one away."""
    for name, value in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir()
            for source in Path(str(value).format(**places)).iterdir():
                (path / source.name).symlink_to(source)
            continue
        path.unlink(missing_ok=True)
        if value is not None:
            path.write_bytes(value if isinstance(value, bytes) else value.format(**places).encode())


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_mistake_ends_in_one_line(cli: Cli, places: dict[str, str], tmp_path: Path, mistake: Mistake) -> None:
    lay(tmp_path, mistake.files, places)
    before = tree(tmp_path)
    code, out, err = cli(
        *(word.format(**places) if "{" in word and "=" not in word else word for word in mistake.words)
    )
    *notes, line = err.splitlines()
    assert line.startswith("error: "), err
    assert not any(note.startswith("error") for note in notes)
    assert "Traceback" not in err
    for part in mistake.says:
        assert part.format(**places) in line if part == "{bert}" else part in line
    assert code == (3 if mistake.name in IN_DATA else mistake.code)
    assert out == ""
    assert tree(tmp_path) == before


IN_DATA = {
    *(
        "data.validation=nowhere.csv",
        "data.label=lable",
        "missing file",
        "missing file with a near one",
        "unknown format",
    ),
    *("label only in validation", "bad JSON", "no Parquet", "tags for a classifier", "texts for a tagger"),
    *("evaluate on missing data", "evaluate with an unknown format", "evaluate with a wrong column"),
    *(
        "check missing data",
        "evaluate with an unknown label",
        "empty text to predict",
        "empty line to predict",
        "missing file to predict",
    ),
}
SOME = ("train.lr=nan", "missing file", "predict on no run", "unknown command")


@pytest.mark.parametrize("mistake", [m for m in MISTAKES if m.name in SOME], ids=lambda mistake: mistake.name)
def test_debug_shows_the_traceback(cli: Cli, places: dict[str, str], mistake: Mistake) -> None:
    code, _, err = cli("--debug", *(word.format(**places) for word in mistake.words))
    assert code == (3 if mistake.name in IN_DATA else 2)
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-1].startswith("error: ")


def test_table_names_each_mistake_once() -> None:
    assert len({mistake.name for mistake in MISTAKES}) == len(MISTAKES)


def test_fault_of_ours_ends_in_one_line_and_code_1(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    import lorakit.data.read

    def broken(*asked: object) -> bool:
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(lorakit.data.read, "holds_words", broken)
    code, _, err = cli("train", "a.csv", "--model", "x")
    assert (code, err) == (1, "error: RuntimeError: first (a fault of lorakit's; --debug shows where)\n")


def test_interrupt_ends_with_code_130(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    import lorakit.data.read

    def interrupted(*asked: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(lorakit.data.read, "holds_words", interrupted)
    code, _, err = cli("train", "a.csv", "--model", "x")
    assert (code, err.strip()) == (
        130,
        "error: interrupted",
    )  # after click's line break, which follows the terminal's ^C
