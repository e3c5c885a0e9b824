"""What each file may import, held as data, and what one file alone may do; a violation is a test that names the place."""

from __future__ import annotations

import ast
import functools
import importlib.util
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import lorakit
import lorakit.lora
from lorakit.lora.config import DATA_INIT_NAMES, INIT_NAMES, UPDATE_NAMES

PACKAGE = Path(lorakit.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

BELOW_INFERENCE = frozenset(
    {
        "errors",
        "hashing",
        "task_info",
        "lora",
        "recipe",
        "pooling",
        "model_files",
        "models",
        "data",
        "tasks",
        "runtime",
    }
)
# Which parts of the package each part may import; itself always, and the root for its version.
ALLOWED: Mapping[str, frozenset[str]] = {
    "errors": frozenset(),
    "hashing": frozenset({"errors"}),
    "lora": frozenset({"errors", "hashing"}),
    "task_info": frozenset({"errors"}),
    "recipe": frozenset({"errors", "hashing", "lora", "task_info"}),
    "pooling": frozenset({"errors", "hashing"}),
    "model_files": frozenset({"errors", "hashing"}),
    "models": frozenset({"model_files", "pooling", "errors", "hashing", "lora", "recipe"}),
    "data": frozenset({"errors", "hashing", "lora", "recipe"}),
    "tasks": frozenset({"errors", "lora", "task_info", "recipe", "models", "pooling", "data"}),
    "runtime": frozenset({"errors", "hashing", "lora", "tasks"}),
    "inference": BELOW_INFERENCE,
    "training": BELOW_INFERENCE | {"inference"},
    "app": BELOW_INFERENCE | {"inference", "training"},
    "": frozenset(
        {"app", "data", "inference", "task_info"}
    ),  # the root's verbs and estimators, imported when they are first used
    "__main__": frozenset({"app"}),
}
# Libraries that these files alone may import (imports of types under TYPE_CHECKING are free).
OWNERS = {
    "transformers": ("models.py",),
    "huggingface_hub": (
        "model_files.py",
        "data/columnar.py",
        "app/card.py",
        "app/commands/doctor.py",
        "app/commands/push.py",
    ),
    "datasets": ("data/columnar.py",),
    "ray": ("app/on_ray.py",),
    "python_calamine": ("data/delimited.py",),
    "spacy": ("data/annotation_files.py",),
}
NEVER = {"peft", "accelerate", "lightning", "pytorch_lightning"}
LORA_NEEDS = {"torch", "safetensors", "lorakit"}
VAGUE = {"utils", "util", "helpers", "common", "misc"}
RUNS_CODE = {"from_pretrained", "from_config", "get_class_from_dynamic_module", "pipeline"}  # that a file brings
PRINTS = {"click.echo", "click.secho", "print"}


class Import(NamedTuple):
    """One imported name: the dotted module, and what is taken from it ('' for the module itself)."""

    module: str
    name: str
    line: int


@functools.cache
def nodes_of(path: Path) -> list[ast.AST]:
    """Every node of a file."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


@functools.cache
def imports_of(path: Path) -> list[Import]:
    """Every import of a file, inside functions too; those under TYPE_CHECKING left out."""
    return list(_imports(nodes_of(path)))


def _imports(nodes: Sequence[ast.AST]) -> Iterator[Import]:
    typing_only = {
        id(inner)
        for node in nodes
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in nodes:
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, "", node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (Import("." * node.level + (node.module or ""), alias.name, node.lineno) for alias in node.names)


def part_of(relative: Path) -> str:
    """The part of the package that a file belongs to: its first folder, or its own name at the top."""
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem.replace("__init__", "")


def violations(package: Path) -> list[str]:
    """Every import in a package folder that the tables above do not allow."""
    found: list[str] = []
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        for entry in imports_of(path):
            if reason := _reason(relative, entry):
                found.append(f"{relative.as_posix()}:{entry.line}: {reason}")
    return found


def _reason(relative: Path, entry: Import) -> str:
    part, top = part_of(relative), entry.module.split(".")[0]
    if entry.module.startswith("."):
        return "relative import"
    if top in NEVER or (top == "transformers" and entry.name == "Trainer"):
        return f"{top} is never imported"
    if relative.as_posix() not in OWNERS.get(top, (relative.as_posix(),)):
        return f"{top} belongs to {' and '.join(OWNERS[top])}"
    if part == "lora" and top not in LORA_NEEDS | sys.stdlib_module_names:
        return f"lora/ does without {top}"
    if top == "lorakit" and (other := _part_named(entry)) not in ALLOWED[part] | {part, ""}:
        return f"{part or 'the root'} may not import {other}"
    return ""


def _part_named(entry: Import) -> str:
    dotted = [*entry.module.split("."), entry.name]
    return dotted[1] if dotted[1] in ALLOWED else ""


def cycle(package: Path) -> list[str]:
    """The modules of an import cycle, or nothing. The root, which imports lazily, is left out."""
    names = {_dotted(path, package): path for path in package.rglob("*.py")}
    graph = {
        name: {target for entry in imports_of(path) for target in _targets(entry, names)}
        for name, path in names.items()
        if name != package.name
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as err:
        return list(err.args[1])
    return []


def _dotted(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _targets(entry: Import, names: Mapping[str, Path]) -> set[str]:
    inner = f"{entry.module}.{entry.name}"
    return {inner} if inner in names else {entry.module} & names.keys()


# The package


def test_imports_point_down_only() -> None:
    assert violations(PACKAGE) == []


def test_imports_make_no_cycle() -> None:
    assert cycle(PACKAGE) == []


def test_modules_have_telling_names() -> None:
    assert [str(path) for path in FILES if path.stem in VAGUE or path.parent.name in VAGUE] == []


def test_table_has_every_part_of_the_package() -> None:
    assert {part_of(path.relative_to(PACKAGE)) for path in FILES} == set(ALLOWED)


def test_one_function_reads_by_transformers_and_trusts_no_code() -> None:
    found = []
    for path in FILES:
        functions = [node for node in nodes_of(path) if isinstance(node, ast.FunctionDef)]
        for node in nodes_of(path):
            place = ""
            if isinstance(node, ast.Attribute) and node.attr in RUNS_CODE:
                place = node.attr
            elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                place = f"trust_remote_code={ast.unparse(node.value)}"
            if place:
                around = [f.name for f in functions if f.lineno <= node.lineno <= (f.end_lineno or 0)]
                found.append((path.name, around, place))
    here = ("models.py", ["_from_pretrained"])
    assert sorted(found) == [(*here, "from_pretrained"), (*here, "trust_remote_code=False")]


def test_every_command_prints_in_one_way() -> None:
    calls = [(path, node) for path in FILES for node in nodes_of(path) if isinstance(node, ast.Call)]
    assert [path.name for path, call in calls if ast.unparse(call.func) in PRINTS] == ["printing.py"]


@pytest.mark.parametrize(
    ("file", "source", "reason"),
    [
        ("training/run.py", "def f():\n    from lorakit.app import cli", "training may not import app"),
        ("errors.py", "import lorakit.lora", "errors may not import lora"),
        ("training/run.py", "from transformers import AutoModel", "transformers belongs to models.py"),
        ("app/cli.py", "import peft.tuners", "peft is never imported"),
        ("lora/layers.py", "import numpy as np", "lora/ does without numpy"),
        ("lora/layers.py", "from .config import LoraConfig", "relative import"),
    ],
)
def test_forbidden_import_is_found(tmp_path: Path, file: str, source: str, reason: str) -> None:
    place = tmp_path / "lorakit" / file
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(source)
    assert violations(tmp_path / "lorakit") == [f"{file}:{source.count(chr(10)) + 1}: {reason}"]


# What a fresh interpreter loads


def loaded(code: str, names: set[str]) -> set[str]:
    """Those of the named modules that a fresh interpreter has loaded after running the code."""
    script = f"import sys\n{code}\nprint(' '.join({names!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_no_module_of_lora_hides_a_public_name() -> None:
    """`from lorakit.lora import merge` would give the module where one of that name had been imported before."""
    assert {path.stem for path in (PACKAGE / "lora").glob("*.py")} & set(lorakit.lora.__all__) == set()


def test_settings_know_the_names_of_all_variants() -> None:
    from lorakit.lora.inits import INITS
    from lorakit.lora.inits_from_data import DATA_INITS
    from lorakit.lora.updates import UPDATES

    assert (tuple(INITS), tuple(DATA_INITS), tuple(UPDATES)) == (INIT_NAMES, DATA_INIT_NAMES, UPDATE_NAMES)


def test_metrics_and_reports_need_numpy_alone() -> None:
    names = [path.stem for path in (PACKAGE / "tasks" / "metrics").glob("[a-z]*.py")]
    code = "\n".join(
        ["import lorakit.app.report.comparison", *(f"import lorakit.tasks.metrics.{name}" for name in names)]
    )
    assert loaded(code, {"torch", "transformers", "scipy", "sklearn", "numpy"}) == {"numpy"}


def test_help_imports_no_command_and_help_of_a_command_no_torch() -> None:
    heavy = {"torch", "transformers", "numpy", "sklearn", "matplotlib", "pyarrow", "uvicorn", "huggingface_hub"}
    of_commands = {f"lorakit.app.commands.{path.stem}" for path in (PACKAGE / "app" / "commands").glob("[a-z]*.py")}
    code = "from lorakit.app.cli import COMMANDS, main\nmain(['--help'])"
    assert loaded(code, {*heavy, *of_commands, "pydantic", "lorakit.app.cli"}) == {"lorakit.app.cli"}
    code += "\nfor name in COMMANDS: main([name, '--help'])"
    assert loaded(code, {*heavy, *of_commands}) == of_commands


def test_lora_answers_and_training_load_no_library_that_they_do_without(bert_run: Path, tmp_path: Path) -> None:
    """A person waits for each of them. transformers itself imports scipy, and pictures of a finished run matplotlib."""
    of_lora = {"torch", "safetensors"}
    others = {"transformers", "datasets", "pydantic", "click", "rich", "pyarrow", "sklearn", "matplotlib", "peft"}
    never = {"sklearn", "pandas", "datasets", "optuna", "pyarrow", "peft", "fastapi", "lorakit.app.server.routes"}
    training = {"lorakit.training.run", "lorakit.training.prepare", "lorakit.app.report.page", "matplotlib"}
    code = (
        "from lorakit.lora import add_adapter\n"
        f"assert (early := {of_lora | others!r} & set(sys.modules)) == {of_lora!r}, early\n"
        "from lorakit.app.cli import main\n"
        f"main(['predict', {str(bert_run)!r}, 'a superb film'])\n"
        f"assert not (early := {never | training!r} & set(sys.modules)), early\n"
        f"main(['train', {str(bert_run / 'recipe.toml')!r}, {f'output.dir={tmp_path}/run'!r}, 'train.max_steps=1'])"
    )
    assert loaded(code, never | {"transformers", "matplotlib"}) == {"transformers", "matplotlib"}


def test_mistakes_of_a_recipe_and_missing_files_are_refused_without_torch() -> None:
    mistakes = """
        train.lrr=1 | train.lr=fast | task.name=poetry | task.metric=entity_f1 | lora.init=pizza | lora.init=loftq |
        lora.update=adalroa | lora.use_dora=true lora.lora_bias=true | lora.rank_pattern={query=0} |
        lora.target_modules=[] | lora.target_modules=( | lora.target_r=4 | model.quantize=nf4 train.method=full |
        model.dtype=bf16 train.method=full | model.quantize=nf4 train.shard_base=true |
        task.name=token_classification task.crf=true train.method=full |
        task.name=ordinal_classification task.order=[low,low]
    """
    recipe = PACKAGE / "recipes" / "sst2-bert.toml"
    code = (
        "import lorakit.task_info, lorakit.lora.config\n"
        "from lorakit.app.cli import main\n"
        f"of_recipe = [('train', {str(recipe)!r}, *words.split()) for words in {mistakes!r}.split('|')]\n"
        f"others = [(verb, {str(recipe)!r}, 'train.lrr=1') for verb in ('check', 'inspect')]\n"
        f"sweep = ('sweep', {str(recipe)!r}, 'lora.rr=1,2', '--optuna', '--trials', '2')\n"
        "for words in (('train', 'nowhere.csv', '--model', 'minilm', 'train.lrr=1'), sweep, *others, *of_recipe):\n"
        "    try:\n"
        "        main(words)\n"
        "    except SystemExit as end:\n"
        "        assert end.code == 2, words\n"
        "    else:\n"
        "        raise AssertionError(words)\n"
    )
    code += (
        "assert not {'numpy', 'safetensors'} & set(sys.modules)\n"
        "train, mine = 'train nowhere.csv --model minilm', 'mine nowhere.csv --model minilm --out x.jsonl'\n"
        "for words in (train, mine, 'check nowhere.csv', 'predict nowhere text', 'report nowhere'):\n"
        "    try:\n"
        "        main(words.split())\n"
        "    except SystemExit as end:\n"
        "        assert end.code in (2, 3), words\n"
        "    else:\n"
        "        raise AssertionError(words)\n"
    )
    assert loaded(code, {"torch", "transformers", "lorakit.recipe"}) == {"lorakit.recipe"}


@pytest.mark.parametrize("folder", ["benchmarks", "scripts"])
def test_programs_import_modules_that_exist(folder: str) -> None:
    for path in (PACKAGE.parents[1] / folder).glob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        names = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
        ours = {name for name in names if name.partition(".")[0] == PACKAGE.name}
        assert not [name for name in ours if not importlib.util.find_spec(name)], path.name


# Participles that say nothing of the thing they name, and words of a dialect that the package once had.
PARTICIPLES = frozenset({"asked", "found", "kept", "said", "settled", "told", "wanted"})
DIALECT = frozenset({"chorus", "crowded", "gently", "kin", "lane", "mould", "stranger"})


def test_names_say_what_a_thing_is() -> None:
    wrong = []
    for path, node in ((file, node) for file in FILES for node in nodes_of(file)):
        name = getattr(node, {ast.Name: "id", ast.arg: "arg", ast.Attribute: "attr"}.get(type(node), ""), "")
        if name.strip("_") in DIALECT | PARTICIPLES:
            wrong.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {name}")  # type: ignore[attr-defined]
    assert wrong == []
