"""`lorakit predict`: answers of one run, or of many adapters over one base model; `lorakit evaluate`: its scores."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import reduce
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorakit.app.arguments import ALLOW_MISMATCH, DEVICE, RUN, Run, check_run, check_sources, named_columns
from lorakit.app.printing import begin, echo, tell
from lorakit.errors import ConfigError, DataError, OutputError

if TYPE_CHECKING:
    from lorakit.data.example import Columns, Example
    from lorakit.inference.batch_scoring import Answerer

FOLDER_OPTIONS = ("keep", "format", "shard_rows", "on_error", "as_json")


@click.command()
@click.argument("words", type=Run(path_type=str), nargs=-1, metavar="[RUN] [TEXT ...]")
@click.option(
    "--file",
    "sources",
    multiple=True,
    metavar="FILE|PATTERN",
    help="Read texts from this file: lines of a .txt file, or the text column of a table. Several with --out FOLDER.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Write to this .jsonl, .csv, .tsv or .parquet file, or in shards to a FOLDER (a name without suffix).",
)
@ALLOW_MISMATCH
@click.option(
    "--merge",
    is_flag=True,
    help="Merge the adapter into the base first. About 10 % faster, and the same up to rounding.",
)
@DEVICE
@click.option(
    "--adapters",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="In place of RUN: a folder of runs or adapters on one base model.",
)
@click.option(
    "--adapter-column",
    metavar="COLUMN",
    help="With --adapters: the column in --file that names the adapter for each row.",
)
@click.option("--text", help="With --file: column of the text. Default: as in training, or a common name.")
@click.option("--pair", help="With --file: column of the second text in pairs.")
@click.option("--choices", help="With --file: column of the choices, or several with commas. Default: as in training.")
@click.option(
    "--choice", multiple=True, metavar="TEXT", help="With one TEXT: a choice to answer it with, twice or more."
)
@click.option("--keep", multiple=True, metavar="COLUMN", help="With --out FOLDER: copy this column to the answers.")
@click.option(
    "--format", type=click.Choice(("parquet", "jsonl")), help="With --out FOLDER: format of the shards (parquet)."
)
@click.option("--shard-rows", type=click.IntRange(min=1), help="With --out FOLDER: rows per shard (16384).")
@click.option(
    "--on-error",
    type=click.Choice(("stop", "skip")),
    help="With --out FOLDER: stop at a bad row (default), or list it in a _rejected file and continue.",
)
@click.option("--json", "as_json", is_flag=True, default=None, help="With --out FOLDER: print the totals as JSON.")
def predict(
    *,
    words: tuple[str, ...],
    sources: tuple[str, ...],
    out: Path | None,
    allow_base_mismatch: bool,
    merge: bool,
    device: str,
    adapters: Path | None,
    adapter_column: str | None,
    choice: tuple[str, ...],
    **options: Any,
) -> None:
    """Predict TEXTs, or the texts in a file, in order.

    Prints one line of JSON for each. With --out FOLDER, files of any size are read and answered in shards.
    If interrupted, run the same command again to continue.

    \b
    lorakit predict runs/reviews "a superb film"
    lorakit predict --adapters runs --file texts.csv --adapter-column customer --out answers.jsonl
    lorakit predict runs/reviews --file 'in/part-*.parquet' --out answers --keep id
    lorakit predict runs/exam "What do bees make?" --choice Honey --choice Paper
    """
    if out is not None and not out.resolve().parent.is_dir():
        raise OutputError(f"--out {out}: its folder does not exist")
    to_folder = out is not None and (out.is_dir() or not out.suffix)
    _check_options(options, sources, to_folder)
    if out is not None and not to_folder:
        from lorakit.inference.batch_scoring import check_ending

        check_ending(out)
        if any(Path(source).resolve() == out.resolve() for source in sources):
            raise OutputError(f"--out {out}: is also read by --file and would be overwritten; choose another name")
    if merge and adapters is not None:
        raise ConfigError("predict: --merge only works with one RUN, because --adapters share their base")
    run, texts = _run(words, sources, adapters, adapter_column)
    if choice and len(texts) != 1:
        raise ConfigError(
            "predict: --choice only works with one TEXT; in a --file the choices are in columns (--choices)"
        )
    check_sources(sources)
    begin(f"loading {run or adapters}")
    from lorakit.app.console import Screen
    from lorakit.inference.answer import chunks
    from lorakit.inference.batch_scoring import by_label, by_run, stream_answers

    columns = replace(named_columns(options["text"], options["pair"], None, options["choices"]), label=adapter_column)
    of: AbstractContextManager[Answerer]
    if adapters is not None:
        of = by_label(adapters, device=device)
    else:
        loaded = by_run(run, allow_base_mismatch=allow_base_mismatch, merge=merge, device=device, report=Screen())
        of = nullcontext(loaded)
    with of as answerer, _in_words_of_options():
        if to_folder and out is not None:
            return _to_folder(answerer, sources, columns, out, options)
        examples = _examples(answerer, texts, choice, sources, columns)
        answers = chain.from_iterable(map(answerer.lines, chunks(examples)))
        if out is not None:
            stream_answers(out, answers, answerer.tasks, pairs=any(example.pair is not None for example in examples))
            tell(f"{out}: {len(examples):,} answer{'s' * (len(examples) != 1)}", err=True)
        else:
            for answer in answers:
                echo(json.dumps(answer, ensure_ascii=False))


def _check_options(options: dict[str, Any], sources: Sequence[str], to_folder: bool) -> None:
    flags = [f"--{'json' if name == 'as_json' else name.replace('_', '-')}" for name in FOLDER_OPTIONS if options[name]]
    if to_folder and not sources:
        raise ConfigError("predict --out FOLDER reads texts from --file; for one file of answers use --out NAME.jsonl")
    if flags and not to_folder:
        raise ConfigError(f"predict: {flags[0]} only works with --out FOLDER")
    if len(sources) > 1 and not to_folder:
        raise ConfigError(f"predict: to read {len(sources)} files, write to a folder with --out FOLDER")
    if named := [f"--{name}" for name in ("text", "pair", "choices") if options[name] and not sources]:
        raise ConfigError(f"predict: {named[0]} only works with --file")


def _run(
    words: Sequence[str], sources: Sequence[str], adapters: Path | None, column: str | None
) -> tuple[str, Sequence[str]]:
    """The run and the texts, of which --adapters takes neither."""
    if adapters is not None:
        if words or not sources or column is None:
            raise ConfigError(
                "predict --adapters needs --file for the texts and --adapter-column for the names of the adapters"
            )
        return "", ()
    if column is not None:
        raise ConfigError("predict: --adapter-column only works with --adapters")
    if not words:
        raise click.UsageError("Missing argument 'RUN'.")
    run, *texts = words
    if bool(texts) == bool(sources):
        quoted = "; put patterns in quotes: --file 'part-*.parquet'" if sources else ""
        raise ConfigError(f"predict takes either texts or --file{quoted}")
    check_run(run)
    return run, texts


def _examples(
    answerer: Answerer, texts: Sequence[str], choice: tuple[str, ...], sources: Sequence[str], columns: Columns
) -> Sequence[Example]:
    """The texts, or those of one file: all are checked before the first is answered."""
    from lorakit.data.example import Example
    from lorakit.data.read import read_texts

    examples: Sequence[Example] = [
        Example(text, where=f"text {i} of {len(texts)}", choices=choice) for i, text in enumerate(texts, start=1)
    ]
    for source in sources:
        dataset = read_texts(Path(source), columns.over(answerer.columns, source))
        examples = dataset.examples
        for note in dataset.notes:
            echo(note, err=True)
    for example in examples:
        answerer.check(example)
    return examples


def _to_folder(
    answerer: Answerer, sources: Sequence[str], columns: Columns, out: Path, options: dict[str, Any]
) -> None:
    from lorakit.app.console import Screen
    from lorakit.data.files import find_files
    from lorakit.inference.batch_scoring import SHARD_ROWS, Job, score_files

    job = Job(
        files=find_files(sources),
        columns=columns,
        keep=options["keep"],
        shard_rows=options["shard_rows"] or SHARD_ROWS,
        format=options["format"] or "parquet",
        skips_bad=options["on_error"] == "skip",
    )
    totals = score_files(job, answerer, out, Screen())
    if options["as_json"]:
        echo(json.dumps(totals))
    else:
        echo(f"{totals['answered']:,} of {totals['rows']:,} rows answered, {totals['rejected']:,} rejected: {out}")


@contextmanager
def _in_words_of_options() -> Iterator[None]:
    """Mistakes in data speak of the recipe's keys; here these are options."""
    try:
        yield
    except DataError as err:
        options = {
            "data.text": "--text",
            "data.pair": "--pair",
            "data.choices": "--choices",
            "data.label": "--adapter-column",
        }
        raise DataError(reduce(lambda text, key: text.replace(key, options[key]), options, str(err))) from err


@click.command()
@click.argument("run", type=RUN)
@click.argument("data")
@click.option("--text", help="Column of the text.")
@click.option("--pair", help="Column of the second text in pairs. Default: as in training.")
@click.option("--label", help="Column of the label, or several with commas. Default: as in training.")
@click.option("--choices", help="Column of the choices, or several with commas. Default: as in training.")
@click.option("--format", "format_", default="auto", help="Format of DATA. Default: guessed from its name and content.")
@DEVICE
@click.option("--json", "as_json", is_flag=True, help="Print the scores as JSON.")
@ALLOW_MISMATCH
def evaluate(
    run: Path, data: str, format_: str, as_json: bool, allow_base_mismatch: bool, device: str, **columns: str | None
) -> None:
    """Score RUN, a run folder or an adapter, on labelled DATA."""
    check_sources([data])
    begin(f"loading {run}")
    from lorakit.app.console import Screen, score_lines
    from lorakit.inference.predictor import load

    predictor = load(run, allow_base_mismatch=allow_base_mismatch, device=device, report=Screen())
    dataset = predictor.read_labelled(data, named_columns(**columns), format_)
    for note in dataset.notes:
        echo(note, err=True)
    scores = predictor.evaluate(dataset.examples)
    if as_json:
        echo(json.dumps(scores))
    else:
        tell("\n".join(score_lines(scores)))
