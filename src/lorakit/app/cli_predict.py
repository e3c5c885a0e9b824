"""`lorakit predict`: answers of one run, or of many adapters over one base model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import click

from lorakit.errors import ConfigError, DataError, OutputError


@click.command()
@click.argument("words", nargs=-1, metavar="[RUN] [TEXT ...]")
@click.option(
    "--file",
    "source",
    type=click.Path(path_type=Path),
    help="Texts from a file: .txt lines, or the text column of a table.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Write the answers here, a JSON line each.")
@click.option("--allow-base-mismatch", is_flag=True, help="Load the adapter onto a base model it was not trained on.")
@click.option(
    "--adapters",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="In place of RUN: a folder of runs or adapters over one base model.",
)
@click.option("--adapter-column", metavar="COLUMN", help="With --adapters: the column of --file that names each row's.")
@click.option("--text", help="With --adapters: column of the text.")
@click.option("--pair", help="With --adapters: column of the second text of pairs.")
def predict(
    words: tuple[str, ...],
    source: Path | None,
    out: Path | None,
    allow_base_mismatch: bool,
    adapters: Path | None,
    **columns: str | None,
) -> None:
    """Answer TEXTs, or the texts in a file, one JSON line each, in order.

    \b
    lorakit predict runs/reviews "a superb film"
    lorakit predict --adapters runs --file texts.csv --adapter-column customer --out answers.jsonl
    """
    if out is not None and not out.resolve().parent.is_dir():
        raise OutputError(f"--out {out}: its folder does not exist")
    if adapters is not None:
        if words or source is None or columns["adapter_column"] is None:
            raise ConfigError(
                "predict --adapters takes its texts by --file, and the adapters' names by --adapter-column"
            )
        return _write(_by_column(adapters, source, columns), out)
    if given := [f"--{name.replace('_', '-')}" for name, column in columns.items() if column is not None]:
        raise ConfigError(f"predict: {given[0]} goes with --adapters")
    if not words:
        raise click.UsageError("Missing argument 'RUN'.")
    run, *texts = words
    if bool(texts) == (source is not None):
        raise ConfigError("predict takes either texts or --file")
    from lorakit.data.read import read_texts
    from lorakit.engine.predictor import load

    predictor = load(run, allow_base_mismatch=allow_base_mismatch)
    if source is None:
        return _write(iter(predictor.predict(texts)), out)
    dataset = read_texts(source, predictor.side.columns)
    for note in dataset.notes:
        click.echo(note, err=True)
    _write(predictor.stream(dataset.examples), out)


def _by_column(adapters: Path, source: Path, columns: Mapping[str, str | None]) -> Iterator[dict[str, Any]]:
    """Answers to the rows of a file by the adapters that they name."""
    from lorakit.data.example import Columns
    from lorakit.data.read import read
    from lorakit.engine.pool import AdapterPool, Asked, find_adapters

    folders = find_adapters(adapters)
    try:
        dataset = read(
            str(source), "text", columns=Columns(columns["text"], columns["pair"], columns["adapter_column"])
        )
    except DataError as err:  # in the words of recipes
        options = {"data.text": "--text", "data.pair": "--pair", "data.label": "--adapter-column"}
        raise DataError(reduce(lambda said, key: said.replace(key, options[key]), options, str(err))) from err
    for note in dataset.notes:
        click.echo(note, err=True)
    with AdapterPool(folders) as pool:
        yield from pool.stream([Asked(str(e.label), replace(e, label=None)) for e in dataset.examples])


def _write(answers: Iterator[dict[str, Any]], out: Path | None) -> None:
    lines = (json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
    if out is None:
        for line in lines:
            click.echo(line, nl=False)
    else:
        from lorakit.engine.atomic import atomic_file

        with atomic_file(out) as unfinished, unfinished.open("w", encoding="utf-8") as file:
            file.writelines(lines)
