"""Write docs/reference/ from what the program says of itself (`--help`, the recipe's model, the docstrings), and the recipe's
keys as types for editors.

python scripts/reference.py          write the pages
python scripts/reference.py --check  end with 1 where one of them is out of date
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import click
from pydantic import BaseModel

import lorakit
import lorakit.lora
from lorakit import recipe
from lorakit.app.api import SHORTCUTS
from lorakit.app.cli import commands
from lorakit.inference.predictor import Predictor
from lorakit.training.results import Result

ROOT = Path(__file__).parent.parent
MADE = "<!-- Made by scripts/reference.py. Do not edit. -->"
WIDTH = 96  # of --help, whatever the terminal
OF_LORA = (
    "In the examples `model` and `other_model` are small BERTs, `batch` is what they take, and `folder` a new `Path`."
)


def pages() -> dict[str, str]:
    """Each file by its path in the repository."""
    texts = {"cli": cli(), "recipe": keys(), "python": python()}
    made = {f"docs/reference/{name}.md": f"{text}\n{MADE}\n" for name, text in texts.items()}
    return {**made, "src/lorakit/app/recipe_types.py": types()}


# The command line


def cli() -> str:
    """`--help` of the program and of every command."""
    parts = ["# The command line", "", "What `lorakit --help` and `lorakit COMMAND --help` print."]
    program = click.Context(
        commands, info_name="lorakit", terminal_width=WIDTH, max_content_width=WIDTH, **commands.context_settings
    )
    each = [click.Context(commands.load(name), program, name) for name in commands.list_commands(program)]
    for context in (program, *each):
        parts += ["", f"## {context.command_path}", "", "```text", context.get_help().rstrip(), "```"]
    return "\n".join(parts) + "\n"


# The recipe


def keys() -> str:
    """Every key of a recipe: its values, its default, and what it does."""
    remarks = comments(Path(recipe.__file__))
    for key, tasks in recipe.task_keys().items():
        remarks["TaskSection", key] += f" For {', '.join(tasks)}."
    parts = ["# The recipe", ""]
    parts += [
        "These are all the keys of a recipe. Write them in a TOML file, or as `section.key=value` on the command line. A",
        "key that is not listed here is an error that suggests the nearest one. So is a value of the wrong type, NaN, or a",
        "number out of range. The `recipe.toml` of a run lists all keys with the values it used.",
    ]
    for section, field in recipe.Recipe.model_fields.items():
        kind: Any = field.annotation
        parts += ["", f"## [{section}]", "", inspect.cleandoc(kind.__doc__), ""]
        parts += ["| key | value | default | what it does |", "|---|---|---|---|"]
        parts += [row(kind, key, schema, remarks.get((kind.__name__, key), "")) for key, schema in schemas(kind)]
    return "\n".join(parts) + "\n"


def row(kind: type[BaseModel], key: str, schema: Mapping[str, Any], remark: str) -> str:
    """A key's line of the table."""
    field = kind.model_fields[key]
    default = "**required**" if field.is_required() else shown(field.get_default(call_default_factory=True))
    cells = (f"`{key}`", said(schema), default, remark)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def schemas(kind: type[BaseModel]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The JSON schema of each field."""
    yield from kind.model_json_schema()["properties"].items()


def shown(value: object) -> str:
    """A default as TOML has it; nothing for one that is unset."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, (tuple, list)):
        return f"`{list(value)}`"
    return f'`"{value}"`' if isinstance(value, str) else f"`{value}`"


def said(schema: Mapping[str, Any]) -> str:
    """A JSON schema in words."""
    if "anyOf" in schema or "oneOf" in schema:
        kinds = [said(one) for one in schema.get("anyOf", schema.get("oneOf")) if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    match schema.get("type"):
        case "array":
            return f"list of {said(schema['items'])}"
        case "object":
            return f"table of {said(schema['additionalProperties'])}"
        case "string":
            return "text"
        case "boolean":
            return "`true`, `false`"
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[name]:g}" for name, sign in bounds.items() if name in schema]
    return " ".join([{"integer": "whole number", "number": "number"}[schema["type"]], ", ".join(limits)]).strip()


def comments(path: Path) -> dict[tuple[str, str], str]:
    """The comment above each field of each class; every key of a section has one."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    found = {}
    for node in ast.parse(text).body:
        for field in node.body if isinstance(node, ast.ClassDef) else []:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                above = lines[field.lineno - 2].strip()
                found[node.name, field.target.id] = above.removeprefix("#").strip() if above.startswith("#") else ""
    return found


def types() -> str:
    """The module in which each section is a TypedDict, and the shortcuts of `lorakit.train` are one."""
    remarks = comments(Path(recipe.__file__))
    sections: dict[str, Any] = {name: field.annotation for name, field in recipe.Recipe.model_fields.items()}
    lines = [
        '"""The sections of a recipe as types, for editors and type checkers. Made by scripts/reference.py. Do not edit."""'
    ]
    lines += ["", "from __future__ import annotations", "", "from collections.abc import Mapping, Sequence"]
    lines += ["from pathlib import Path", "from typing import Literal, Required, TypedDict"]
    for name, kind in sections.items():
        lines += ["", "", f"class {name.title()}Keys(TypedDict, total=False):", f'    """{first_sentence(kind)}"""', ""]
        for key, field in kind.model_fields.items():
            of_field = typed(field.annotation)
            lines.append(f"    {key}: {f'Required[{of_field}]' if field.is_required() else of_field}")
            if remark := remarks.get((kind.__name__, key)):
                lines.append(f'    """{remark}"""')
    lines += ["", "", "class Shortcuts(TypedDict, total=False):"]
    lines += ['    """Arguments of `lorakit.train` that stand for one key of a section."""', ""]
    for name, key in SHORTCUTS.items():
        section, _, inner = key.partition(".")
        of_field = typed(sections[section].model_fields[inner].annotation)
        lines += [
            f"    {name}: {of_field.replace('str', 'str | Path') if name == 'folder' else of_field}",
            f'    """{key}"""',
        ]
    return "\n".join(lines) + "\n"


def first_sentence(kind: type) -> str:
    """Of a docstring."""
    return inspect.cleandoc(kind.__doc__ or "").partition("\n")[0]


def typed(annotation: Any) -> str:
    """What a key takes, as an annotation: bounds are left out, and a list is any sequence."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return typed(arguments[0])
    if origin is Literal:
        return f"Literal[{', '.join(map(repr, arguments))}]".replace("'", '"')
    if origin is tuple:
        return f"Sequence[{typed(arguments[0])}]"
    if origin is dict:
        return f"Mapping[{', '.join(map(typed, arguments))}]"
    if arguments:
        return " | ".join(dict.fromkeys(map(typed, arguments)))
    return "None" if annotation is type(None) else annotation.__name__


# Python


def python() -> str:
    """The public names of `lorakit` and of `lorakit.lora`, with their docstrings."""
    parts = ["# Python", "", "The functions and estimators of `lorakit`, and the LoRA core in `lorakit.lora`."]
    for module in (lorakit, lorakit.lora):
        parts += ["", f"## {module.__name__}", *([] if module is lorakit else ["", OF_LORA])]
        for name in sorted(module.__all__, key=str.lower):
            parts += of_name(name, getattr(module, name))
    parts += ["", "## What they give", *of_name("Predictor", Predictor), *of_name("Result", Result)]
    return "\n".join(parts) + "\n"


def of_name(name: str, thing: Any) -> list[str]:
    """A public name's part of the page; nothing for the version."""
    if isinstance(thing, Mapping):
        return ["", f"### {name}", "", "A table: " + ", ".join(f"`{key}`" for key in thing) + "."]
    if isinstance(thing, str):
        return [] if name.startswith("_") else ["", f"### {name}", "", f'The word `"{thing}"`.']
    parts = ["", f"### {name}", "", *signature(name, thing), "", *documented(thing.__doc__)]
    if inspect.isclass(thing):
        for method, function in public_methods(thing):
            parts += ["", f"#### {name}.{method}", "", *signature(method, function), "", *documented(function.__doc__)]
    return parts


def public_methods(kind: type) -> Iterator[tuple[str, Any]]:
    """Methods that it or its bases of ours define and describe."""
    seen: set[str] = set()
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] == "lorakit":
            for name, function in vars(base).items():
                if inspect.isfunction(function) and function.__doc__ and not name.startswith("_") and name not in seen:
                    seen.add(name)
                    yield name, function


def signature(name: str, thing: Any) -> list[str]:
    """The call as code, an argument a line where it is long."""
    try:
        given = inspect.signature(thing)
    except ValueError:
        return ["```python", name, "```"]
    arguments = [p for p in given.parameters.values() if p.name != "self"]
    given = given.replace(parameters=[p.replace(default=Named(p.default)) for p in arguments])
    line = f"{name}{given}".replace("'", "")
    if len(line) > WIDTH:
        words = [str(p) for p in given.parameters.values()]
        if stars := [i for i, p in enumerate(given.parameters.values()) if p.kind is p.KEYWORD_ONLY]:
            has_rest = any(p.kind is p.VAR_POSITIONAL for p in given.parameters.values())
            words[stars[0] : stars[0]] = [] if has_rest else ["*"]
        end = "" if given.return_annotation is given.empty else f" -> {given.return_annotation}"
        line = f"{name}(\n" + "".join(f"    {word},\n" for word in words) + f"){end}"
        line = line.replace("'", "")
    return ["```python", line, "```"]


class Named:
    """A default value that prints without addresses."""

    def __new__(cls, value: Any) -> Any:
        """The value itself where its print is the same each time."""
        return value if value is inspect.Parameter.empty else super().__new__(cls)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        if isinstance(self.value, str):
            return f'"{self.value}"'
        if callable(self.value):
            return getattr(self.value, "__qualname__", type(self.value).__name__)
        if isinstance(self.value, Mapping) or repr(self.value) == "<factory>":  # of a dataclass: a new dict
            return "{}"
        is_plain = isinstance(self.value, (int, float, tuple, type(None)))
        return repr(self.value) if is_plain else f"{type(self.value).__name__}()"


def documented(docstring: str | None) -> list[str]:
    """A docstring as Markdown: what is indented below a word with a colon becomes a list."""
    lines: list[str] = []
    is_code = False
    for line in inspect.cleandoc(docstring or "").splitlines():
        if line.startswith(">>> ") and not is_code:
            lines.append("```pycon")
        elif is_code and not line:
            lines.append("```")
        is_code = line.startswith(">>> ") or (is_code and bool(line))
        if is_code:
            lines.append(line)
            continue
        text = re.sub(r"([*<])", r"\\\1", line) if "`" not in line else line
        if re.fullmatch(r"(Raises|Attributes|Returns|Args):", line):
            lines += [f"**{line[:-1]}**", ""]
        elif re.match(r"    \w+: ", line):
            name, rest = text.strip().split(": ", 1)
            lines.append(f"- `{name}`: {rest}")
        else:
            lines.append(text.strip() if lines and lines[-1].startswith("- `") else text)
    return [*lines, "```"] if is_code else lines


def main() -> int:
    """Write the pages, or say which are out of date."""
    made = pages()
    if "--check" in sys.argv:
        old = [name for name, text in made.items() if (ROOT / name).read_text(encoding="utf-8") != text]
        print("\n".join(f"{name} is out of date: python scripts/reference.py" for name in old), end="")
        return int(bool(old))
    for name, text in made.items():
        (ROOT / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
