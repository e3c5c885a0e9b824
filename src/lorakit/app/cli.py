"""The program: its commands, each imported when it runs, and what happens when one fails."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from importlib import import_module
from keyword import iskeyword

import click

import lorakit
from lorakit.app.printing import echo, tell
from lorakit.errors import EXIT_CODES, Interrupted, LorakitError, RankError, first_line

# Each command is in a module of its name in `lorakit.app.commands`; this is the first sentence of its help.
GROUPS = {
    "Start": {
        "quickstart": "Train on the bundled data, and try the model on new sentences.",
        "doctor": "Check that this machine has everything lorakit needs.",
        "completion": "Print a script that completes commands and keys in SHELL.",
    },
    "Train": {
        "check": "Check whether DATA is fit to train on, and list likely mistakes.",
        "train": "Train with the settings in RECIPE, or on DATA with --model.",
        "recipe": "List, show or copy the built-in recipes.",
        "sweep": "Train RECIPE with many settings, and show which work best.",
        "mine": "Find hard negatives for pairs of texts.",
    },
    "Evaluate": {
        "evaluate": "Score RUN, a run folder or an adapter, on labelled DATA.",
        "compare": "Test whether RUNs differ by more than chance.",
        "report": "Write RUN's report, a single HTML file.",
        "inspect": "Show what is in a MODEL or RUN, or what a RECIPE would train.",
    },
    "Predict": {
        "predict": "Predict TEXTs, or the texts in a file, in order.",
        "embed": "Turn the texts in a file into vectors.",
        "serve": "Serve the adapters of RUNs, or of FOLDERs of runs, over HTTP.",
    },
    "Share": {
        "merge": "Merge RUN's adapter into its base: a plain transformers folder.",
        "export": "Write RUN's model or adapter in another program's format.",
        "import": "Check an adapter trained with peft, and convert it.",
        "combine": "Combine RUNs into one adapter: a weighted sum, TIES or DARE.",
        "card": "Write RUN's model card again, README.md next to its adapter.",
        "push": "Upload RUN's adapter with its card to the Hugging Face hub.",
    },
}
COMMANDS = {name: line for group in GROUPS.values() for name, line in group.items()}
# Those whose module has another name
MODULES = {
    "card": "report",
    "compare": "report",
    "evaluate": "predict",
    "import": "import_",
    "merge": "export",
    "mine": "embed",
}
CODES = "Exit codes:\n\n\b\n" + "\n".join(f"{code:>2}  {meaning}" for code, meaning in EXIT_CODES.items())


class Commands(click.Group):
    """The table above; a command is imported when it runs or shows its help. `lorakit --help` imports none."""

    def load(self, name: str) -> click.Command:
        """The command of this name, out of its module."""
        module = import_module(f"lorakit.app.commands.{MODULES.get(name, name)}")
        command: click.Command = getattr(module, f"{name}_" if iskeyword(name) else name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command named by the first word, imported."""
        if args[0] in COMMANDS:
            self.add_command(self.load(args[0]))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands by what they are for."""
        width = max(map(len, COMMANDS))
        for title, group in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), line) for name, line in group.items()])


@click.group(
    cls=Commands,
    commands=[click.Command(name, help=line) for name, line in COMMANDS.items()],
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=CODES,
)
@click.version_option(lorakit.__version__, prog_name="lorakit")
def commands() -> None:
    """LoRA fine-tuning: from a file of labelled text to an honest score and an adapter you can deploy.

    Add --debug to any command to see the traceback of an error.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. A failure ends in one line on stderr and a code of `lorakit.errors.EXIT_CODES`."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in argv
    words = [word for word in argv if word != "--debug"]
    try:
        commands.main(words, prog_name="lorakit", standalone_mode=False, obj=argv)
    except Interrupted as err:
        if os.environ.get("RANK", "0") == "0":  # only the first of several processes prints
            tell(f"{err}{how_to_go_on(words)}", err=True)
        sys.exit(err.exit_code)
    except RankError as err:  # another process has reported why
        sys.exit(err.exit_code)
    except LorakitError as err:
        fail(str(err), err.exit_code, debug)
    except click.exceptions.NoArgsIsHelpError as err:
        echo(err.format_message(), err=True)
        sys.exit(2)
    except click.NoSuchOption as err:
        from lorakit.recipe import full_key

        key = full_key(err.option_name.lstrip("-"))
        hint = f"No such option '{err.option_name}'. Settings are written without dashes: {key}=VALUE"
        fail(hint if key else err.format_message(), err.exit_code, debug)
    except click.ClickException as err:
        fail(err.format_message(), err.exit_code, debug)
    except (KeyboardInterrupt, click.Abort):
        fail("interrupted", 130, debug)
    except BrokenPipeError:  # `lorakit predict ... | head`
        sys.stderr.close()
        sys.exit(0)
    except Exception as err:
        text = first_line(err, "no message")
        fail(f"{type(err).__name__}: {text} (this is a bug in lorakit; --debug shows where)", 1, debug)


def program() -> None:
    """`main` as a process. After a signal it exits at once: unloading torch would take 1.6 s of the grace period."""
    try:
        main()
    except SystemExit as end:
        if end.code == Interrupted.exit_code:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(Interrupted.exit_code)
        raise


def fail(message: str, code: int, debug: bool) -> None:
    """End the process with one line on stderr, or with a traceback before it."""
    if debug:
        import traceback

        echo(traceback.format_exc(), err=True)
    one_line = " ".join(line.strip() for line in message.splitlines())  # a library's message may have several
    tell(f"error: {one_line}", err=True, color="red")
    sys.exit(code)


def how_to_go_on(words: Sequence[str]) -> str:
    """The command that continues an interrupted training, sweep or prediction of files; empty for other commands."""
    if words[0] == "predict":
        return f"; to continue: {shlex.join(['lorakit', *words])}"
    if words[0] == "sweep":
        return f"; to continue: {shlex.join(['lorakit', *(word for word in words if word != '--resume'), '--resume'])}"
    if words[0] != "train":
        return ""
    others = [word for i, word in enumerate(words) if not word.startswith("--resume") and words[i - 1] != "--resume"]
    return f"; to continue: {shlex.join(['lorakit', *others, '--resume', 'auto'])}"


if __name__ == "__main__":
    main()
