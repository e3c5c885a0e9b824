"""`lorakit completion`, and what a shell is told while somebody types: recipe keys and run folders, without torch."""

from __future__ import annotations

import ast
import glob
from functools import cache
from pathlib import Path
from typing import Any

import click
from click.shell_completion import BashComplete, CompletionItem, get_completion_class

from lorakit.app.printing import echo

RECIPE = Path(__file__).parents[2] / "recipe.py"
VARIABLE = "_LORAKIT_COMPLETE"  # by which click's scripts ask
SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print what makes SHELL complete verbs, options, recipe keys and run folders.

    \b
    bash  put this into ~/.bashrc:                             eval "$(lorakit completion bash)"
    zsh   put this into ~/.zshrc, below compinit:              eval "$(lorakit completion zsh)"
    fish  put this into ~/.config/fish/completions/lorakit.fish: lorakit completion fish | source
    """
    found = get_completion_class(shell)
    assert found is not None
    script = found(context.find_root().command, {}, "lorakit", VARIABLE)
    text = script.source_template % script.source_vars()
    echo(_without_space_after_equals(text) if isinstance(script, BashComplete) else text)


def _without_space_after_equals(script: str) -> str:
    """After `lora.r=` a value follows, so bash is told to leave the space out."""
    added = "            COMPREPLY+=($value)\n"
    return script.replace(added, f"{added}            if [[ $value == *= ]]; then compopt -o nospace; fi\n", 1)


@cache
def recipe_keys() -> dict[str, tuple[str, ...]]:
    """Every section.key of a recipe and the words it may be, read off recipe.py, whose import would need torch."""
    classes = {
        node.name: node for node in ast.parse(RECIPE.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)
    }
    return {
        f"{section}.{key}": _words(annotation)
        for section, kind in _fields(classes["Recipe"])
        for key, annotation in _fields(classes[ast.unparse(kind)])
    }


def _fields(node: ast.ClassDef) -> list[tuple[str, ast.expr]]:
    fields = (line for line in node.body if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name))
    return [(line.target.id, line.annotation) for line in fields if isinstance(line.target, ast.Name)]


def _words(annotation: ast.expr) -> tuple[str, ...]:
    """Those of a Literal; true and false of a bool."""
    if ast.unparse(annotation) == "bool":
        return ("true", "false")
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Literal":
        return tuple(str(node.value) for node in ast.walk(annotation.slice) if isinstance(node, ast.Constant))
    return ()


class Change(click.types.StringParamType):
    """A section.key=value word."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        before = ("", *(ctx.params.get(param.name or "") or ()))
        key, equals, word = incomplete.partition("=")
        if equals:
            return [CompletionItem(f"{key}={value}") for value in _values(key) if value.startswith(word)]
        if before[-1] == "=":  # bash makes three words of key=value
            return [CompletionItem(value) for value in _values(before[-2]) if value.startswith(incomplete)]
        if not incomplete and before[-1] in recipe_keys():  # with nothing behind the =, which click takes away
            return [CompletionItem(value) for value in _values(before[-1])]
        return [CompletionItem(f"{known}=") for known in recipe_keys() if known.startswith(incomplete)]


def _values(key: str) -> tuple[str, ...]:
    return recipe_keys().get(key, ())


class Run(click.Path):
    """The folder of a run."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Runs below what is typed or, with nothing typed, below runs/; where there are none, the shell's own folders."""
        typed = Path(incomplete or "runs/")
        is_whole = not incomplete or incomplete.endswith("/")
        parent, begin = (typed, "") if is_whole else (typed.parent, typed.name)
        folders = sorted(path for path in parent.glob(f"{glob.escape(begin)}*") if (path / "recipe.toml").is_file())
        return [CompletionItem(str(path)) for path in folders] or [CompletionItem(incomplete, type="dir")]


TYPES: dict[str, click.ParamType[Any]] = {  # by an argument's name, or its verb's and its own
    "changes": Change(),
    "sweep words": Change(),
    "run": Run(path_type=Path),
    "runs": Run(path_type=Path),
    "folders": Run(path_type=Path),
    "predict words": Run(path_type=str),
}


def complete(group: click.Group) -> None:
    """Let the arguments of a group's verbs be completed by what they stand for."""
    for verb, command in group.commands.items():
        for parameter in command.params:
            found = TYPES.get(parameter.name or "") or TYPES.get(f"{verb} {parameter.name}")
            if isinstance(parameter, click.Argument) and found is not None:
                parameter.type = found
