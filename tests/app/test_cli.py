"""The command line: every command once on a real tiny model, with what it prints and what it leaves."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

import lorakit
from lorakit.app.arguments import default_folder, with_folder
from lorakit.app.cli import COMMANDS
from lorakit.app.commands import quickstart
from lorakit.app.report.page import verdict_in
from lorakit.recipe import RECIPES, known_keys, make_recipe, read_recipe, recipe_file
from tests.app.conftest import Cli
from tests.runs import Sections, changed, scores_of, sections, weights

FAST = ("model.dtype=fp32", "train.epochs=1", "train.batch_size=12", "train.lr=0.02")


def parsed(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def written(path: Path, raw: Sections, *words: str) -> Path:
    path.write_text(changed(raw, *words).to_toml(), encoding="utf-8")
    return path


# train


def test_train_recipe_takes_changes_and_names_the_run_after_itself(
    cli: Cli, bert: Path, files: Path, tmp_path: Path
) -> None:
    written(tmp_path / "small.toml", sections(bert, files))
    code, out, err = cli("train", "small.toml", *FAST, "lora.target_modules=query,value", "train.seed=4")
    assert (code, "Traceback" in err) == (0, False)
    folder = tmp_path / "runs" / "small"
    recipe = read_recipe(folder / "recipe.toml")
    assert (recipe.train.seed, recipe.lora.target_modules) == (4, ("query", "value"))
    scores = scores_of(folder)
    low, high = scores["intervals"]["accuracy"]
    assert f"accuracy           {scores['accuracy']:.4f} [{low:.3f}, {high:.3f}]" in out
    counts = scores["parameters"]
    assert f"trained {counts['trainable']:,} of {counts['total']:,} parameters" in out
    assert f"run folder: {Path('runs') / 'small'}\n" in out
    assert out.endswith("\n".join(["", *verdict_in(Path("runs/small")).lines, ""]))
    assert f"validation accuracy {scores['accuracy']:.4f}" in err


def test_train_data_prints_json_and_is_resumed_to_the_same_end_over_the_same_data(
    cli: Cli, bert: Path, files: Path, tmp_path: Path
) -> None:
    shutil.copy(files / "train.csv", data := tmp_path / "mine.csv")
    words = ("train", "mine.csv", "--model", bert, *FAST, "--json")
    code, out, err = cli(*words)
    run = Path("runs") / "mine"
    assert (code, json.loads(out)["run"]) == (0, str(run))
    assert {"accuracy", "macro_f1", "parameters"} <= json.loads(out).keys()
    assert json.loads(out)["verdict"] == verdict_in(run).lines
    assert "text is column 'text'" in err
    assert "the score comes from 3-fold cross-validation: 3 models, each scored on" in err
    before = weights(run)
    code, _, err = cli(*words, "--resume", "auto")
    assert (code, "resumed after step 3" in err, weights(run)) == (0, True, before)
    data.write_text(data.read_text().replace("film", "fiim", 1))
    code, _, err = cli(*words, "--resume", "auto")
    assert code == 2
    assert "error: --resume: the data changed since the checkpoint was written: the sha256 of mine.csv differs" in err


@pytest.mark.parametrize(
    ("model", "words", "task"),
    [
        ("bert", "train.csv", "sequence_classification"),
        ("roberta", "train.conll", "token_classification"),
        ("t5", "train.conll", "text2text_ner"),
        (
            "bert",
            "train.ratings.csv --task multi-label --label topics data.label_separator=|",
            "multi_label_classification",
        ),
    ],
)
def test_dry_run_takes_the_task_from_data_or_word_and_writes_nothing(
    cli: Cli, request: pytest.FixtureRequest, files: Path, tmp_path: Path, model: str, words: str, task: str
) -> None:
    data, *options = words.split()
    base = request.getfixturevalue(model)
    short = ("--dry-run", "model.dtype=fp32", "train.batch_size=64", "train.epochs=8")
    code, out, _ = cli("train", files / data, "--model", base, *options, *short)
    assert code == 0
    assert f": {task.replace('_', ' ')}\n" in out and len(out.splitlines()) < 12
    assert re.search(r"^time: about [\d.]+ s for the steps on this machine", out, re.M)
    assert "parameters: " in out
    assert "steps: 8 (1 an epoch), base in float32" in out
    assert list(tmp_path.iterdir()) == []


def test_dry_run_counts_targets_and_inspect_lists_each(cli: Cli, bert: Path, files: Path, tmp_path: Path) -> None:
    recipe = written(tmp_path / "small.toml", sections(bert, files), "lora.target_modules=query", "lora.r=3")
    assert "\nadapted: query x2 (r 3, alpha 16)\n" in cli("train", recipe, "--dry-run").out
    code, out, _ = cli("inspect", recipe)
    rows = [line.split() for line in out.splitlines() if line.startswith("bert.encoder")]
    assert code == 0
    assert rows == [[f"bert.encoder.layer.{i}.attention.self.query", "query", "3", "16", "96"] for i in (0, 1)]


# evaluate


@pytest.mark.parametrize(
    ("name", "ending", "keys"),
    [
        ("bert_run", "csv", ["text", "label", "score", "probabilities"]),
        ("tagger_run", "conll", ["text", "entities"]),
    ],
)
def test_run_is_evaluated_as_in_training_and_answers_and_is_inspected(
    cli: Cli, request: pytest.FixtureRequest, files: Path, name: str, ending: str, keys: list[str]
) -> None:
    run = request.getfixturevalue(name)
    scores = scores_of(run)
    code, out, _ = cli("evaluate", run, files / f"validation.{ending}", "--json")
    evaluated = json.loads(out)
    assert code == 0
    assert evaluated == {key: scores[key] for key in evaluated} and scores["metric"] in evaluated

    texts = ["Ada visited Oslo.", "the film was superb"]
    code, out, err = cli("predict", run, *texts)
    answers = parsed(out)
    assert (code, err) == (0, "")
    assert [answer["text"] for answer in answers] == texts
    for answer in answers:
        assert list(answer) == keys
        for entity in answer.get("entities", ()):
            assert list(entity) == ["entity_group", "word", "start", "end", "score"]
            assert answer["text"][entity["start"] : entity["end"]] == entity["word"]

    recipe = read_recipe(run / "recipe.toml")
    code, out, _ = cli("inspect", run)
    assert code == 0
    assert f"task: {recipe.task.name}" in out
    assert f"base: {recipe.model.base}, sha256 " in out
    assert "adapter: LoRA, r 4, alpha 16" in out


def test_evaluate_takes_columns_by_name(cli: Cli, bert_run: Path, tmp_path: Path) -> None:
    (tmp_path / "odd.csv").write_text("review,text,verdict\na superb film,1,good\nstale,2,bad\n")
    usual = "text,label\na superb film,good\nstale,bad\n"
    (tmp_path / "usual.csv").write_text(usual)
    odd = cli("evaluate", bert_run, "odd.csv", "--text", "review", "--label", "verdict", "--json")
    assert json.loads(odd.out) == json.loads(cli("evaluate", bert_run, "usual.csv", "--json").out)


def test_evaluate_takes_the_pair_of_a_run_trained_on_pairs(cli: Cli, bert: Path, tmp_path: Path) -> None:
    rows = [
        f"the film was {w},the plot was {v},{'same' if w == v else 'other'}"
        for w in ("superb", "stale")
        for v in ("superb", "stale")
    ]
    (tmp_path / "pairs.csv").write_text("\n".join(["sentence1,sentence2,label", *rows]) + "\n")
    words = ("data.pair=sentence2", "data.validation=pairs.csv", "output.dir=run", "--json")
    trained = json.loads(cli("train", "pairs.csv", "--model", bert, *FAST, *words).out)
    found = json.loads(cli("evaluate", "run", "pairs.csv", "--pair", "sentence2", "--json").out)
    assert found == {key: trained[key] for key in found}
    lines = parsed((tmp_path / "run" / "predictions.jsonl").read_text())
    pairs = [tuple(row.split(",")[:2]) for row in rows]
    assert [(line["text"], line["pair"]) for line in lines] == pairs
    assert json.loads(cli("evaluate", "run", "pairs.csv", "--json").out) == found  # the column is remembered
    answers = parsed(cli("predict", "run", "--file", "pairs.csv").out)
    assert answers == lorakit.load("run").predict(pairs)
    assert [answer["label"] for answer in answers] == [line["label"] for line in lines]
    assert "trained on pairs of texts" in cli("predict", "run", "the film was superb").err


# predict


def test_predict_answers_a_file_in_order(cli: Cli, bert_run: Path, tmp_path: Path) -> None:
    texts = [f"the film {i} was {'superb' * (i % 3)}." for i in range(70)]
    rows = ["id,text", *(f"{i},{text}" for i, text in enumerate(texts))]
    (tmp_path / "in.csv").write_text("\n".join(rows) + "\n")
    code, out, _ = cli("predict", bert_run, "--file", "in.csv", "--out", "answers.jsonl")
    assert (code, out) == (0, "")
    answers = parsed((tmp_path / "answers.jsonl").read_text(encoding="utf-8"))
    assert [answer["text"] for answer in answers] == texts
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "in.csv"]


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_what_the_reader_left_out_is_noted_beside_the_answers(
    cli: Cli, bert_run: Path, tmp_path: Path, command: str
) -> None:
    record = {"text": "the film was superb.", "label": "good", "answer": "accept"}
    lines = [record, {**record, "answer": "ignore"}, record]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--file", "in.jsonl"] if command == "predict" else ["in.jsonl", "--json"]
    code, out, err = cli(command, bert_run, *words)
    assert (code, len(out.splitlines())) == (0, 2 if command == "predict" else 1)
    assert "in.jsonl: records that were not accepted, left out: 1 (in.jsonl:2 (ignore))" in err


# inspect and merge


def test_inspect_model_lists_the_names_of_its_layers(cli: Cli, bert: Path) -> None:
    code, out, _ = cli("inspect", bert)
    assert code == 0
    assert {"query", "key", "value", "dense", "classifier"} <= {line.split()[0] for line in out.splitlines()[1:]}


def test_inspect_recipe_shows_the_resolved_recipe_and_its_targets(
    cli: Cli, bert: Path, files: Path, tmp_path: Path
) -> None:
    written(tmp_path / "small.toml", sections(bert, files))
    code, out, _ = cli("inspect", "small.toml", "lora.r=2")
    assert code == 0
    assert "r = 2\n" in out
    assert "trained in full: classifier, bert.pooler.dense" in out
    assert sum(line.startswith("bert.encoder.layer.") for line in out.splitlines()) == 12


# The rest


def test_help_names_every_command_and_each_has_its_own(cli: Cli) -> None:
    code, out, _ = cli("--help")
    assert code == 0
    for command in COMMANDS:
        assert f"\n  {command} " in out
        shown = cli(command, "--help")
        assert shown.code == 0 and shown.out.startswith(f"Usage: lorakit {command} ")
    code, _, err = cli()
    assert code == 2 and err.startswith("Usage: lorakit ")
    assert lorakit.__version__ in cli("--version").out


def test_recipes_that_ship_are_used_by_their_names(cli: Cli, hub_out_of_reach: None) -> None:
    listed = json.loads(cli("recipe", "list", "--json").out)
    assert {"sst2-bert", "conll-t5"} <= listed.keys()
    for name in listed:
        resolved = read_recipe(RECIPES / f"{name}.toml")
        assert make_recipe(resolved.model_dump()) == resolved
        assert cli("recipe", "show", name).out == (RECIPES / f"{name}.toml").read_text()
    assert max(map(len, cli("recipe", "list").out.splitlines())) <= 80
    assert cli("recipe", "copy", "sst2-bert").code == 0
    assert Path("sst2-bert.toml").read_text() == (RECIPES / "sst2-bert.toml").read_text()
    assert "sst2-bert.toml exists already" in cli("recipe", "copy", "sst2-bert").err
    for verb in (["train", "--dry-run"], ["check"], ["inspect"]):  # each as far as its data or its model
        code, _, err = cli(verb[0], "sst2-bert", "model.base=./none", "data.train=none.csv", *verb[1:])
        assert code in (2, 3) and "none" in err
    assert json.loads(cli("sweep", "sst2-bert", "lora.r=2,4", "--dry-run", "--json").out)
    Path("sst2-bert").mkdir()  # one's own file or folder goes first
    assert recipe_file("sst2-bert") is None


@pytest.mark.parametrize("name", ["conll-t5", "sst2-bert"])
def test_advice_of_recipes_works_without_a_hub(
    name: str, cli: Cli, hub_out_of_reach: None, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorakit.model_files._minilm", lambda: bert)
    for source in (Path(lorakit.__file__).parent / "demo").glob("*-validation.*"):
        for part in ("train", "val", "test"):
            shutil.copy(source, f"{part}{source.suffix}")
    advice = re.findall(r"^# lorakit (.+)$", (RECIPES / f"{name}.toml").read_text(), re.MULTILINE)
    assert len(advice) == 1
    # the tiny model takes no more tokens, and it need not be seen how long a whole batch takes
    shown = cli(*advice[0].split(), "data.max_length=48", "train.batch_size=2", "--dry-run")
    assert shown.code == 0, shown.err


def test_known_keys_are_those_of_a_resolved_recipe() -> None:
    resolved = make_recipe({"model": {"base": "x"}}).model_dump()
    assert known_keys() == [f"{section}.{key}" for section, table in resolved.items() for key in table]


@pytest.mark.parametrize(
    ("source", "folder"),
    [
        *(("a/reviews.csv", "reviews"), ("glue:sst2#train", "glue-sst2"), ("o/name@v1", "name-v1")),
        *(("folder/", "folder"), ("a/part-*.csv", "part")),
    ],
)
def test_default_folder_is_named_after_the_data(source: str, folder: str) -> None:
    assert default_folder(make_recipe({"model": {"base": "x"}, "data": {"train": source}})) == Path("runs") / folder


def test_folders_number_themselves_unless_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = make_recipe({"model": {"base": "x"}, "data": {"train": "reviews.csv"}})
    folders: list[str | None] = []
    for made, resume in (("", "auto"), ("", None), ("reviews", None), ("reviews-2", None), ("", "auto")):
        Path("runs", made).mkdir(parents=True, exist_ok=True)
        folders.append(with_folder(recipe, resume).output.dir)
    assert folders == ["runs/reviews", "runs/reviews", "runs/reviews-2", "runs/reviews-3", "runs/reviews-2"]
    assert with_folder(recipe, "runs/reviews/checkpoints/step-2").output.dir == "runs/reviews"
    assert with_folder(recipe, None, Path("runs/small")).output.dir == "runs/small"
    named = make_recipe({"model": {"base": "x"}, "output": {"dir": "runs/reviews"}})
    assert with_folder(named, None) == named
    monkeypatch.setenv("WORLD_SIZE", "2")  # none of several processes sees which is free
    assert with_folder(recipe, None).output.dir == "runs/reviews"


def test_quickstart_trains_and_answers(
    cli: Cli, bert: Path, roberta: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, base in (("FEW", bert), ("SENTIMENT", bert), ("ENTITIES", roberta)):
        raw = getattr(quickstart, name)
        data = {part: tmp_path / Path(source).name for part, source in raw["data"].items()}
        for part, file in data.items():  # the first lines of the whole data, to the end of a sentence
            lines = Path(raw["data"][part]).read_text().split("\n")
            n = lines.index("", 200) if file.suffix == ".conll" else 201
            file.write_text("\n".join(lines[:n]) + "\n")
        tiny = {"model": {"base": str(base), "dtype": "fp32"}, "train": {**raw.get("train", {}), "max_steps": 1}}
        monkeypatch.setattr(quickstart, name, {**raw, **tiny, "data": {part: str(file) for part, file in data.items()}})
    (tmp_path / "there" / "quickstart-ner").mkdir(parents=True)  # the next free name is taken
    code, out, _ = cli("quickstart", "--out", "there")
    assert code == 0
    assert {p.name for p in (tmp_path / "there").glob("*/scores.json") for p in p.parents[:1]} == {
        *("quickstart-sentiment-few", "quickstart-ner-2", "quickstart-sentiment"),
    }
    assert all(text in out for text in (*quickstart.UNSEEN_REVIEWS, *quickstart.UNSEEN_SENTENCES))
    assert out.count("Open next:") == 3
    few, every = out.partition("it was trained on:\n")[2].splitlines()
    assert few.startswith("     32: accuracy ") and every.startswith("    200: accuracy ")


def test_quickstart_of_search_shows_the_base_beside_the_adapter(
    cli: Cli, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = {"model": {"base": str(encoder), "dtype": "fp32"}, "train": {"max_steps": 1, "batch_size": 8}}
    monkeypatch.setattr(quickstart, "SEARCH", {**quickstart.SEARCH, **tiny})
    code, out, _ = cli("quickstart", "search")
    assert code == 0
    assert re.search(r"ndcg_at_10 +0\.\d+ for the untouched base\nndcg_at_10 +0\.\d+ \[", out)
    assert all(f"  {question}\n    " in out for question in quickstart.UNSEEN_QUESTIONS)
    assert "lorakit serve runs/quickstart-search  and ask on http://127.0.0.1:8080" in out


def test_module_runs_as_a_program(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lorakit", "train", "nowhere.csv", "--model", "minilm", "train.lrr=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: train.lrr=1: unknown key") and done.stderr.count("\n") == 1


def test_pipe_that_closes_early_is_no_failure(cli: Cli, bert_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object, **options: object) -> None:
        raise BrokenPipeError

    errors = io.StringIO()
    monkeypatch.setattr(click, "echo", closed)
    monkeypatch.setattr(sys, "stderr", errors)
    assert cli("inspect", bert_run).code == 0
    assert errors.closed  # so that the interpreter does not complain at its end
