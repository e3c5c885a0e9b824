"""`lorakit completion`, and the arguments that a shell completes: recipe keys, tasks and run folders, without torch."""

from __future__ import annotations

import glob
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
from click.shell_completion import BashComplete, CompletionItem, get_completion_class

from lorakit.app.printing import echo

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
    """Every section.key of a recipe, and the words that it may be."""
    from lorakit.recipe import Recipe  # late: --help does without pydantic

    sections: dict[str, Any] = {name: field.annotation for name, field in Recipe.model_fields.items()}
    return {
        f"{name}.{key}": _words(field.annotation)
        for name, section in sections.items()
        for key, field in section.model_fields.items()
    }


def _words(annotation: Any) -> tuple[str, ...]:
    """Those of a Literal; true and false of a bool."""
    if annotation is bool:
        return ("true", "false")
    return get_args(annotation) if get_origin(annotation) is Literal else ()


class TaskType(click.ParamType[str]):
    """A task, by its name in a recipe or by the word for it."""

    name = "task"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from lorakit.errors import did_you_mean

        names = _tasks()
        if value not in names:
            self.fail(f"{value!r} is not a task; {did_you_mean(value, names)}", param, ctx)
        return names[value]

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return f"[{'|'.join(word for word, name in _tasks().items() if word != name)}]"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(word) for word in _tasks() if word.startswith(incomplete)]


def _tasks() -> dict[str, str]:
    """Every word for a task, and its name."""
    from lorakit.recipe import TASK_WORDS, TaskName

    return {**TASK_WORDS, **{name: name for name in get_args(TaskName)}}


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
