"""The errors a user can see. The command line prints one line for each and exits with its code; nothing else is caught."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# What each exit code means.
EXIT_CODES = {
    0: "success",
    1: "a bug in lorakit",
    2: "a mistake in the recipe, on the command line, or in a model, an adapter or a folder",
    3: "data that cannot be read, or does not fit the task",
    4: "a loss, a gradient or a weight that is not finite",
    5: "storage: disk full, read-only, no permission, input/output error",
    75: "stopped by a signal; continue with --resume auto",
}


class LorakitError(Exception):
    """A mistake outside this package's code: what is wrong with which value, where, and what to do.

    >>> try:
    ...     lorakit.train(model="minilm", data="nowhere.csv")
    ... except lorakit.LorakitError as err:
    ...     print(err)
    nowhere.csv: no such file...
    """

    exit_code = 2


class ConfigError(LorakitError):
    """A setting (recipe key, command-line value, LoRA setting) has a value that cannot be used."""


class DataError(LorakitError):
    """An input file cannot be read in its format; the message starts with `file:line`."""

    exit_code = 3


class ModelError(LorakitError):
    """A base model cannot be found, loaded, or adapted as requested."""


class AdapterError(LorakitError):
    """A saved adapter is damaged, or does not belong to this base model."""


class OutputError(LorakitError):
    """A folder or file to write, or a run folder to read, cannot be used."""


class StorageError(OutputError):
    """A disk is full, failing or not writable; what was there before is intact."""

    exit_code = 5


class NumericsError(LorakitError):
    """A loss or a gradient is not finite; nothing non-finite was stored."""

    exit_code = 4


class RankLost(LorakitError):
    """Another process of the run died, hangs, or cannot be reached."""

    exit_code = 1


class RankError(LorakitError):
    """Another process of the run has failed and reported why; this one ends with the same exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Interrupted(LorakitError):
    """A signal stopped the run, which can be resumed."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


def first_line(err: BaseException, otherwise: str | None = None) -> str:
    """The first line of a library's error message; if it is empty, `otherwise`, or the error's type."""
    return (str(err).strip() or otherwise or type(err).__name__).splitlines()[0]


MOST_CHARACTERS = 255  # for example of a file's name


def short(value: object, most: int = 80) -> str:
    """A value as messages show it, shortened if it is long."""
    if isinstance(value, (list, dict)) and len(value) > 100:
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value):,}"
    try:
        text = repr(value)
    except RecursionError:
        return "a value nested too deep"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """The end of an error message: the names nearest to `wrong`, or a short list of all names."""
    names = sorted(set(known))
    # comparing long names is slow, and a long name is not a misspelling of a short one
    close = [name for name in names if name.casefold().strip() == wrong.casefold().strip()][:3]
    if not close and len(wrong) <= MOST_CHARACTERS:
        close = difflib.get_close_matches(wrong, names)
    if close:
        return f"did you mean {' or '.join(repr(name) for name in close)}?"
    if not names:
        return "there are none"
    shown = ", ".join(names[:12])
    return f"known: {shown}{', ...' if len(names) > 12 else ''}"
