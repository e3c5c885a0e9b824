"""Compare what two checkouts do on this machine, byte for byte: python scripts/golden.py OLD NEW

Each trains the same tiny recipes and answers every command's --json, in a folder of its own. Every file that they leave and
every answer is compared; values that differ from one run to the next are masked, and `VOLATILE` lists them. Prints a line an
item, and ends with code 1 where one differs. Needs the test dependencies; no network.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import difflib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# Keys of JSON whose values are times, speeds, memory, versions or facts of the machine, wherever they stand.
VOLATILE = re.compile(r".*seconds|.*_s|ended|started|time|date|created|.*memory.*|versions|machine|pid|.*_gain|bytes")
# Keys whose values are masked where they are the sum or the size of a file that holds such values.
HASHES, HASH = {"state.json", "adapter", "README.md"}, re.compile(r"[0-9a-f]{64}|\d+")
# What in a text differs from one run to the next: times, speeds, dates.
TEXT = [
    (re.compile(r"\b[\d,.]+ (s|ms|min|h|MB|GB|MiB|GiB)\b"), r"# \1"),
    (re.compile(r"\b[\d.]+x\b"), "#x"),
    (re.compile(r"[\d,.]+ (examples|texts|rows|tokens)/s"), r"# \1/s"),
    (re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d(\.\d+)?)?"), "DATE"),
    (re.compile(r"\b[mp][0-9a-f]{10}\b"), "ID"),  # matplotlib's, in SVG
]
SKIPPED = {".png", ".lock", ".db", ".log"}  # pictures hold the time and versions; Optuna's books hold times

SMALL = "train.epochs=4 train.batch_size=8 train.lr=2e-2 lora.r=4 lora.dropout=0.1 model.dtype=fp32"
CSV = "data.train=in/train.csv data.validation=in/validation.csv"
RATINGS = "data.train=in/train.ratings.csv data.validation=in/validation.ratings.csv"
CONLL = "data.train=in/train.conll data.validation=in/validation.conll"

# By name: the base model, and what the recipe says besides SMALL.
RECIPES = {
    "bert": f"in/bert {CSV} data.test=in/validation.csv task.calibrate=true train.checkpoint_every=2",
    "dora": f"in/bert {CSV} lora.use_dora=true lora.init=pissa lora.use_rslora=true train.micro_batch_size=3",
    "quantised": f'in/bert {CSV} model.quantize=nf4 lora.init=loftq lora.target_modules=["query","value"]',
    "full": f"in/bert {CSV} train.method=full train.lr=1e-3",
    "multi-label": f"in/bert {RATINGS} data.label=topics data.label_separator=| task.name=multi_label_classification",
    "regression": f"in/bert {RATINGS} data.label=stars task.name=sequence_regression",
    "ordinal": f"in/bert {RATINGS} data.label=stars task.name=ordinal_classification lora.update=adalora",
    "crf": f"in/roberta {CONLL} task.name=token_classification task.crf=true data.max_length=12 task.stride=4",
    "t5-ner": f"in/t5 {CONLL} task.name=text2text_ner task.constrained=true task.max_target_length=12 train.max_steps=3",
    "t5-labels": f"in/t5 {CSV} task.name=text2text_classification train.max_steps=3",
    "seeds": f"in/bert {CSV} train.seeds=[0,1]",
}

# Commands after those of the recipes, in this order; --json is added where it is not a "predict" of texts.
COMMANDS = f"""
train recipes/bert.toml output.dir=runs/resumed --resume auto
train recipes/bert.toml output.dir=runs/dry --dry-run
train recipes/bert.toml train.lrr=1
train nowhere.csv --model in/bert
sweep recipes/bert.toml train.lr=1e-2,2e-2 lora.r=2,4 output.dir=runs/sweep
sweep recipes/bert.toml lora.r=2,4,8 --halving 2 output.dir=runs/halving
check in/train.csv --run runs/bert
check recipes/crf.toml
evaluate runs/crf in/validation.conll
evaluate runs/bert in/validation.csv
{"".join(f"predict runs/{name} 'the film was superb' 'Ada left Oslo .'" + chr(10) for name in RECIPES if name != "seeds")}
predict runs/bert 'the film was superb' --merge
predict runs/bert --file in/validation.csv --out answers --shard-rows 5 --json
predict --adapters adapters --file in/customers.csv --adapter-column customer
compare runs/bert runs/dora
compare runs/seeds runs/full --on in/train.csv
combine runs/bert runs/sweep/000-lr0.01-r2-seed0 --weights 0.5,0.5 --out runs/combined
inspect in/bert
inspect runs/t5-ner
inspect recipes/dora.toml
export runs/bert --to peft --out exported/peft
export runs/dora --to vllm --out exported/refused
export runs/dora --to vllm --rank 4 --out exported/vllm
export runs/bert --to llamacpp --out exported/llamacpp
export runs/t5-ner --to merged --out exported/t5-ner
export runs/quantised --to merged --out exported/quantised
merge runs/crf --out exported/crf
import exported/peft --base in/bert --labels bad,good --out imported
report runs/bert
report runs/bert runs/dora --out comparison.html
card runs/bert
push runs/bert me/bert --dry-run
serve runs/bert --dry-run
doctor
quickstart --dry-run
"""


# In a process for each checkout


def make_inputs() -> None:
    """Tiny random models and small data files in in/, and a recipe for each name in recipes/."""
    from tests import runs

    folder = Path("in")
    folder.mkdir()
    for save, name in ((runs.save_bert, "bert"), (runs.save_roberta, "roberta"), (runs.save_t5, "t5")):
        save(folder / name)
    for name, n, seed in (("train", 36, 1), ("validation", 12, 2)):
        runs.write_reviews(folder / f"{name}.csv", n, seed)
        runs.write_ratings(folder / f"{name}.ratings.csv", n, seed)
        runs.write_entities(folder / f"{name}.conll", n, seed)
    rows = [f"{text},{('a', 'b')[i % 2]}" for i, (text, _) in enumerate(runs.reviews(9))]
    (folder / "customers.csv").write_text("\n".join(["text,customer", *rows]) + "\n", encoding="utf-8")
    Path("recipes").mkdir()
    for name, words in RECIPES.items():
        changes = dict(word.split("=") for word in f"{SMALL} model.base={words} output.dir=runs/{name}".split())
        lines = [f"{key} = {_toml(value)}" for key, value in changes.items()]
        Path("recipes", f"{name}.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _toml(value: str) -> str:
    return value if re.fullmatch(r"[\d.e-]+|true|false|\[.*\]", value) else json.dumps(value)


def run_all() -> None:
    """Train each recipe and run each command in the current folder; what each prints goes to a file in printed/."""
    Path("printed").mkdir()
    trained = [f"train recipes/{name}.toml" for name in RECIPES]
    for number, line in enumerate([*trained, *filter(None, COMMANDS.splitlines())]):
        words = shlex.split(line)
        if number == len(RECIPES):
            stop_early(Path(shutil.copytree("runs/bert", "runs/resumed")))
            for customer, run_folder in (("a", "runs/bert"), ("b", "runs/dora")):
                shutil.copytree(f"{run_folder}/adapter", f"adapters/{customer}")
        name = re.sub(r"[^\w.=,-]+", "_", f"{number:02} {line}")[:70]
        Path("printed", f"{name}.txt").write_text(run(words if words[0] == "predict" else [*words, "--json"]))


def stop_early(folder: Path) -> None:
    """Take from a run what it wrote after its last checkpoint but one."""
    for path in (max((folder / "checkpoints").glob("step-*")), folder / "adapter"):
        shutil.rmtree(path)
    for name in ("scores.json", "predictions.jsonl", "samples.jsonl", "resamples.json", "report.html"):
        (folder / name).unlink()


def run(words: Sequence[str]) -> str:
    """What a command prints, and its exit code."""
    import lorakit
    from lorakit.app.cli import main

    checkout = str(Path(lorakit.__file__).parents[2])
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(list(words))
        except SystemExit as end:
            code = int(end.code or 0)
    failed = err.getvalue() if code else ""  # of one that ends well it is progress, with speeds
    printed = f"{out.getvalue()}{failed}".replace(checkout, "CHECKOUT")
    return f"$ lorakit {' '.join(words)}\n{printed}exit code {code}\n"


# The comparison


def masked(path: Path) -> bytes:
    """The content of a file without what differs from one run to the next."""
    if path.suffix not in {".json", ".jsonl", ".txt", ".html", ".md", ".svg", ".csv", ".toml"}:
        return path.read_bytes()
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        lines = [json.dumps(row) for row in csv.DictReader(io.StringIO(text))]
    else:
        lines = [text] if path.suffix == ".json" else text.splitlines()
    return "\n".join(map(_masked_text, lines)).encode()


def _masked_text(text: str) -> str:
    try:
        return json.dumps(json.loads(text, object_pairs_hook=_masked), indent=1)
    except ValueError:
        return _without_times(text)


def _masked(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; of strings in lists, which are few, `_without_times` takes nothing away."""
    return {
        key: "<masked>"
        if VOLATILE.fullmatch(key) or (key in HASHES and HASH.fullmatch(str(value)))
        else _without_times(value)
        if isinstance(value, str)
        else value
        for key, value in pairs
    }


def _without_times(text: str) -> str:
    for pattern, instead in TEXT:
        text = pattern.sub(instead, text)
    return text


def compare(old: Path, new: Path) -> int:
    """Print for each folder and each command whether all of it is equal, and how files differ; give how many do."""
    items: dict[str, list[Path]] = {}
    for path in sorted({path.relative_to(folder) for folder in (old, new) for path in folder.rglob("*")}):
        is_file = (old / path).is_file() or (new / path).is_file()
        if is_file and path.parts[0] not in ("in", "recipes") and path.suffix not in SKIPPED:
            items.setdefault(str(path if path.parts[0] == "printed" else Path(*path.parts[:2])), []).append(path)
    different = 0
    for item, files in items.items():
        found = [line for path in files for line in _difference(path, old, new)]
        print(f"{'different' if found else 'equal':<9} {item} ({len(files)} files)", *found, sep="\n    ")
        different += bool(found)
    print(f"{len(items)} items, {different} of them different")
    return different


def _difference(path: Path, old: Path, new: Path) -> list[str]:
    """Some lines that say how a file differs; none where it does not."""
    for folder, other in ((old, "NEW"), (new, "OLD")):
        if not (folder / path).is_file():
            return [f"{path}: only in {other}"]
    first, second = masked(old / path), masked(new / path)
    if first == second:
        return []
    if path.suffix in {".safetensors", ".parquet"}:
        return [f"{path}: other bytes"]
    lines = difflib.unified_diff(first.decode().splitlines(), second.decode().splitlines(), lineterm="", n=0)
    return [f"{path}:", *(f"    {line[:160]}" for line in list(lines)[2:10])]


def main() -> int:
    """Run both checkouts and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--keep", type=Path, help="leave the folders of both here")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = asked.keep or Path(temporary)
        (work / "old").mkdir(parents=True)
        child("make_inputs", ROOT, work / "old")
        shutil.copytree(work / "old", work / "new")
        for name in ("old", "new"):
            child("run_all", getattr(asked, name).resolve(), work / name)
        return int(compare(work / "old", work / "new") > 0)


def child(function: str, checkout: Path, folder: Path) -> None:
    """Run a function of this file over the package of a checkout, in a folder."""
    places = os.pathsep.join(map(str, (checkout / "src", ROOT, ROOT / "scripts")))
    quiet = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": places}
    code = f"import golden; golden.{function}()"
    subprocess.run([sys.executable, "-c", code], cwd=folder, env={**os.environ, **quiet}, check=True)


if __name__ == "__main__":
    sys.exit(main())
