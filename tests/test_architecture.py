"""The direction of imports and the size budgets, held as data; a violation is a failed test that names the place."""

from __future__ import annotations

import ast
import functools
import io
import subprocess
import sys
import tokenize
from collections.abc import Iterator, Mapping
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
    {"errors", "hashing", "fingerprints", "task_info", "lora", "recipe", "models", "data", "tasks", "runtime"}
)
# Which parts of the package each part may import; itself always, and the root for its version.
ALLOWED: Mapping[str, frozenset[str]] = {
    "errors": frozenset(),
    "hashing": frozenset(),
    "lora": frozenset({"errors", "hashing"}),
    "task_info": frozenset({"errors"}),
    "recipe": frozenset({"errors", "hashing", "lora", "task_info"}),
    "fingerprints": frozenset({"errors", "hashing"}),
    "pooling": frozenset({"errors", "hashing"}),
    "models": frozenset({"fingerprints", "pooling", "errors", "hashing", "lora", "recipe"}),
    "data": frozenset({"errors", "hashing", "lora", "recipe"}),
    "tasks": frozenset({"errors", "lora", "task_info", "recipe", "models", "data"}),
    "runtime": frozenset({"errors", "lora", "tasks"}),
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
    "huggingface_hub": ("models.py", "app/card.py", "app/commands/doctor.py", "app/commands/push.py"),
    "datasets": ("data/columnar.py",),
    "ray": ("app/on_ray.py",),
    "python_calamine": ("data/delimited.py",),
    "spacy": ("data/annotation_files.py",),
}
NEVER = {"peft", "accelerate", "lightning", "pytorch_lightning"}
LORA_NEEDS = {"torch", "safetensors", "lorakit"}
VAGUE = {"utils", "util", "helpers", "common", "misc"}

LONGEST_FUNCTION, LONGEST_FILE = 80, 600  # lines of code; of a file, all lines
POSITIONAL, PARAMETERS = 6, 8


class Import(NamedTuple):
    """One imported name: the dotted module, and what is taken from it ('' for the module itself)."""

    module: str
    name: str
    line: int


@functools.cache
def imports_of(path: Path) -> list[Import]:
    """Every import of a file, inside functions too; those under TYPE_CHECKING left out."""
    return list(_imports(ast.parse(path.read_text(encoding="utf-8"))))


def _imports(tree: ast.Module) -> Iterator[Import]:
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
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


class Function(NamedTuple):
    """The size of one function: lines with code in them, docstring and comments left out."""

    place: str
    lines: int
    positional: int
    parameters: int


def functions(path: Path) -> Iterator[Function]:
    """The functions and methods of a file."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    code = code_lines(source) - docstring_lines(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            lines = sum(node.lineno <= line <= (node.end_lineno or 0) for line in code)
            positional = [a.arg for a in node.args.posonlyargs + node.args.args if a.arg not in ("self", "cls")]
            yield Function(
                f"{path.relative_to(PACKAGE.parent)}:{node.lineno} {node.name}",
                lines,
                len(positional),
                len(positional) + len(node.args.kwonlyargs),
            )


def code_lines(source: str) -> set[int]:
    """The lines that are not blank and not a comment alone."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {line for t in tokens if t.type not in layout for line in range(t.start[0], t.end[0] + 1)}


def docstring_lines(tree: ast.Module) -> set[int]:
    """The lines of docstrings."""
    owners = [n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    strings = [n.body[0] for n in owners if ast.get_docstring(n) is not None]
    return {line for s in strings for line in range(s.lineno, (s.end_lineno or 0) + 1)}


# The package


def test_imports_point_down_only() -> None:
    assert violations(PACKAGE) == []


def test_imports_make_no_cycle() -> None:
    assert cycle(PACKAGE) == []


def test_modules_have_telling_names() -> None:
    assert [str(path) for path in FILES if path.stem in VAGUE or path.parent.name in VAGUE] == []


def test_table_has_every_part_of_the_package() -> None:
    assert {part_of(path.relative_to(PACKAGE)) for path in FILES} == set(ALLOWED)


@pytest.fixture(scope="module")
def every() -> list[Function]:
    """Every function of the package."""
    return [function for path in FILES for function in functions(path)]


def test_no_function_is_longer_than_a_page(every: list[Function]) -> None:
    assert [f for f in every if f.lines > LONGEST_FUNCTION] == []


def test_functions_have_few_parameters(every: list[Function]) -> None:
    assert [f for f in every if f.positional > POSITIONAL or f.parameters > PARAMETERS] == []


def test_no_file_is_longer_than_a_chapter() -> None:
    lines = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {path: n for path, n in lines.items() if n > LONGEST_FILE} == {}


# The checks themselves


@pytest.mark.parametrize(
    ("file", "source", "reason"),
    [
        ("lora/layers.py", "from lorakit.training.run import Run", "lora may not import training"),
        ("data/read.py", "from lorakit.models import find", "data may not import models"),
        ("models.py", "import lorakit.data.read", "models may not import data"),
        ("training/run.py", "def f():\n    from lorakit.app import cli", "training may not import app"),
        ("training/run.py", "from lorakit import app", "training may not import app"),
        ("errors.py", "import lorakit.lora", "errors may not import lora"),
        ("training/run.py", "from transformers import AutoModel", "transformers belongs to models.py"),
        ("tasks/base.py", "import datasets", "datasets belongs to data/columnar.py"),
        ("models.py", "from transformers import Trainer", "transformers is never imported"),
        ("app/cli.py", "import peft.tuners", "peft is never imported"),
        ("lora/layers.py", "import numpy as np", "lora/ does without numpy"),
        ("lora/layers.py", "from .config import LoraConfig", "relative import"),
    ],
)
def test_violations_finds_a_forbidden_import(tmp_path: Path, file: str, source: str, reason: str) -> None:
    place = tmp_path / "lorakit" / file
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(source)
    assert violations(tmp_path / "lorakit") == [f"{file}:{source.count(chr(10)) + 1}: {reason}"]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("models.py", "def f():\n    import transformers"),
        ("tasks/base.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from transformers import X"),
        ("training/run.py", "from lorakit.lora import merge\nimport torch, json"),
        ("models.py", "import lorakit\nfrom lorakit import __version__"),
    ],
)
def test_violations_lets_an_allowed_import_pass(tmp_path: Path, file: str, source: str) -> None:
    place = tmp_path / "lorakit" / file
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(source)
    assert violations(tmp_path / "lorakit") == []


def test_cycle_is_found(tmp_path: Path) -> None:
    package = tmp_path / "lorakit"
    package.mkdir()
    (package / "a.py").write_text("from lorakit import b")
    (package / "b.py").write_text("def f():\n    import lorakit.a")
    assert set(cycle(package)) == {"lorakit.a", "lorakit.b"}


def test_function_size_leaves_docstring_and_comments_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    path = tmp_path / "m.py"
    path.write_text('def f(a, *, b):\n    """One.\n\n    Two."""\n\n    # three\n    return (\n        a\n    )\n')
    (found,) = functions(path)
    assert found[1:] == (4, 1, 2)


# What a fresh interpreter loads


def loaded(code: str, names: set[str]) -> set[str]:
    """Those of the named modules that a fresh interpreter has loaded after running the code."""
    script = f"import sys\n{code}\nprint(' '.join({names!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_lora_needs_torch_and_safetensors_alone() -> None:
    heavy = {"transformers", "datasets", "pydantic", "click", "rich", "pyarrow", "sklearn", "matplotlib", "peft"}
    assert loaded("from lorakit.lora import add_adapter", heavy | {"torch", "safetensors"}) == {"torch", "safetensors"}


def test_no_module_of_lora_hides_a_public_name() -> None:
    """`from lorakit.lora import merge` would give the module where one of that name had been imported before."""
    assert {path.stem for path in (PACKAGE / "lora").glob("*.py")} & set(lorakit.lora.__all__) == set()


def test_settings_know_the_names_of_all_variants() -> None:
    from lorakit.lora.inits import INITS
    from lorakit.lora.inits_from_data import DATA_INITS
    from lorakit.lora.updates import UPDATES

    assert (tuple(INITS), tuple(DATA_INITS), tuple(UPDATES)) == (INIT_NAMES, DATA_INIT_NAMES, UPDATE_NAMES)


@pytest.mark.parametrize("module", ["lorakit.task_info", "lorakit.recipe", "lorakit.lora.config"])
def test_floor_does_without_torch(module: str) -> None:
    assert loaded(f"import {module}", {"torch", "transformers", "numpy", "safetensors", module}) == {module}


def test_metrics_and_reports_need_numpy_alone() -> None:
    names = [path.stem for path in (PACKAGE / "tasks" / "metrics").glob("[a-z]*.py")]
    code = "\n".join(["import lorakit.app.report.build", *(f"import lorakit.tasks.metrics.{name}" for name in names)])
    assert loaded(code, {"torch", "transformers", "scipy", "sklearn", "numpy"}) == {"numpy"}


def test_help_imports_no_command_and_help_of_a_command_no_torch() -> None:
    heavy = {"torch", "transformers", "numpy", "sklearn", "matplotlib", "pyarrow", "uvicorn", "huggingface_hub"}
    of_commands = {f"lorakit.app.commands.{path.stem}" for path in (PACKAGE / "app" / "commands").glob("[a-z]*.py")}
    code = "from lorakit.app.cli import COMMANDS, main\nmain(['--help'])"
    assert loaded(code, {*heavy, *of_commands, "pydantic", "lorakit.app.cli"}) == {"lorakit.app.cli"}
    code += "\nfor name in COMMANDS: main([name, '--help'])"
    assert loaded(code, {*heavy, *of_commands}) == of_commands


def test_mistakes_of_a_recipe_are_refused_without_torch() -> None:
    mistakes = [
        ("train.lrr=1",),
        ("train.lr=fast",),
        ("task.name=poetry",),
        ("task.metric=entity_f1",),
        ("lora.init=pizza",),
        ("lora.init=loftq",),
        ("lora.update=adalroa",),
        ("lora.use_dora=true", "lora.lora_bias=true"),
        ("lora.rank_pattern={query=0}",),
        ("lora.target_modules=[]",),
        ("lora.target_modules=(",),
        ("lora.target_r=4",),
        ("model.quantize=nf4", "train.method=full"),
        ("model.dtype=bf16", "train.method=full"),
        ("model.quantize=nf4", "train.shard_base=true"),
        ("task.name=token_classification", "task.crf=true", "train.method=full"),
        ("task.name=ordinal_classification", "task.order=[low,low]"),
    ]
    recipe = PACKAGE.parent.parent / "recipes" / "sst2-bert.toml"
    code = (
        "from lorakit.app.cli import main\n"
        f"of_recipe = [('train', {str(recipe)!r}, *words) for words in {mistakes!r}]\n"
        f"others = [(verb, {str(recipe)!r}, 'train.lrr=1') for verb in ('check', 'inspect')]\n"
        "for words in (('train', 'nowhere.csv', '--model', 'minilm', 'train.lrr=1'), *others, *of_recipe):\n"
        "    try:\n"
        "        main(words)\n"
        "    except SystemExit as end:\n"
        "        assert end.code == 2, words\n"
        "    else:\n"
        "        raise AssertionError(words)\n"
    )
    assert loaded(code, {"torch", "transformers", "numpy", "safetensors", "lorakit.recipe"}) == {"lorakit.recipe"}
