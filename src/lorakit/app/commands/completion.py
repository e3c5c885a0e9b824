"""`lorakit completion`: the script that makes a shell ask this program for completions."""

from __future__ import annotations

import click
from click.shell_completion import BashComplete, get_completion_class

from lorakit.app.printing import echo

VARIABLE = "_LORAKIT_COMPLETE"  # by which click's scripts ask
SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print a script that completes commands and keys in SHELL.

    \b
    bash  put this into ~/.bashrc:                             eval "$(lorakit completion bash)"
    zsh   put this into ~/.zshrc, below compinit:              eval "$(lorakit completion zsh)"
    fish  put this into ~/.config/fish/completions/lorakit.fish: lorakit completion fish | source
    """
    script_class = get_completion_class(shell)
    assert script_class is not None
    script = script_class(context.find_root().command, {}, "lorakit", VARIABLE)
    text = script.source_template % script.source_vars()
    echo(_without_space_after_equals(text) if isinstance(script, BashComplete) else text)


def _without_space_after_equals(script: str) -> str:
    """After `lora.r=` a value follows, so bash leaves the space out."""
    added = "            COMPREPLY+=($value)\n"
    return script.replace(added, f"{added}            if [[ $value == *= ]]; then compopt -o nospace; fi\n", 1)
