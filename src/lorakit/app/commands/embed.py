"""`lorakit embed`: the vectors of many texts."""

from __future__ import annotations

from pathlib import Path

import click

from lorakit.app.arguments import DEVICE, RUN
from lorakit.app.printing import Output, begin, echo
from lorakit.errors import OutputError

ENDINGS = (".npy", ".parquet")


@click.command()
@click.argument("run", type=RUN)
@click.option(
    "--file",
    "source",
    required=True,
    type=click.Path(path_type=Path),
    help="A .txt file with one text on each line, or a table.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Write to this .npy or .parquet file.")
@click.option("--text", help="Column of the text. Default: as in training, or a common name.")
@click.option("--query", is_flag=True, help="The texts are queries, not documents. Adds the query prompt.")
@click.option(
    "--dims", type=click.IntRange(min=1), help="Keep only this many dimensions (for runs trained with task.dims)."
)
@DEVICE
@click.option("--json", "as_json", is_flag=True, help="Print the totals as JSON.")
def embed(
    run: Path, source: Path, out: Path, text: str | None, query: bool, dims: int | None, device: str, as_json: bool
) -> None:
    """Turn the texts in a file into vectors.

    They are written in order, as a numpy array or a table.

    \b
    lorakit embed runs/search --file documents.txt --out vectors.npy
    """
    if out.suffix not in ENDINGS:
        raise OutputError(f"--out {out}: vectors are written as {' or '.join(ENDINGS)} files")
    if not out.resolve().parent.is_dir():
        raise OutputError(f"--out {out}: its folder does not exist")
    begin(f"loading {run}")
    import numpy as np

    from lorakit.app.console import Screen
    from lorakit.data.example import Columns
    from lorakit.data.read import read_texts
    from lorakit.inference.predictor import load
    from lorakit.runtime.files import atomic_file

    predictor = load(run, device=device, report=Screen())
    dataset = read_texts(source, Columns(text or predictor.side.columns.text))
    for note in dataset.notes:
        echo(note, err=True)
    texts = [example.text for example in dataset.examples]
    vectors = predictor.embed(texts, query=query, dims=dims)
    with atomic_file(out) as unfinished:
        if out.suffix == ".npy":
            with unfinished.open("wb") as file:
                np.save(file, vectors)
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
            pq.write_table(pa.table({"text": texts, "embedding": column}), unfinished)
    n, d = vectors.shape
    Output([f"{out}: {n:,} vectors of {d} dimensions"], {"out": str(out), "texts": n, "dims": d}).show(as_json)
