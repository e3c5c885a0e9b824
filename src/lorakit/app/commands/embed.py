"""`lorakit embed` and `mine`: the vectors of many texts, and hard negatives for pairs by what is near what."""

from __future__ import annotations

import json
from pathlib import Path

import click

from lorakit.app.arguments import DEVICE, RUN, check_sources
from lorakit.app.printing import Output, begin, echo
from lorakit.errors import ConfigError, DataError, OutputError

ENDINGS = (".npy", ".parquet")
SEARCHED = 100  # documents that `mine` looks at for each query, besides its own


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
    columns = predictor.side.columns
    dataset = read_texts(source, Columns(text or columns.text, encoding=columns.encoding_of(source)))
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


@click.command()
@click.argument("data")
@click.option(
    "--model",
    required=True,
    metavar="BASE|RUN",
    help="The model to search with: a base model such as minilm, or an embedding run.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Write to this .jsonl file.")
@click.option(
    "--negatives", type=click.IntRange(min=1), default=4, help="At most this many negatives for each pair (4)."
)
@click.option(
    "--margin",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=0.95,
    help="Skip texts with more than this share of the right answer's similarity, because they may be right too (0.95).",
)
@click.option("--text", help="Column of the first texts. Default: a common name.")
@click.option("--pair", help="Column of the second texts. Default: a common name.")
@click.option("--json", "as_json", is_flag=True, help="Print the totals as JSON.")
def mine(
    data: str, model: str, out: Path, negatives: int, margin: float, text: str | None, pair: str | None, as_json: bool
) -> None:
    """Find hard negatives for pairs of texts.

    These are texts that resemble the right answer to a query, but belong to another one.

    \b
    lorakit mine pairs.csv --model minilm --out mined.jsonl
    lorakit train mined.jsonl --model minilm --task rerank
    """
    if out.suffix != ".jsonl":
        raise OutputError(f"--out {out}: negatives are written as .jsonl")
    check_sources([data])
    begin(f"reading {data}")
    from lorakit.data.example import Columns
    from lorakit.data.read import read, usual_pair
    from lorakit.inference.predictor import load, load_embedder
    from lorakit.runtime.files import atomic_text
    from lorakit.tasks.metrics.retrieval import most_similar

    pair = pair or usual_pair(data, Columns(text))
    if pair is None:
        raise ConfigError(f"{data}: which column has the second texts? Use --pair NAME")
    dataset = read(data, "related", columns=Columns(text, pair))
    for note in dataset.notes:
        echo(note, err=True)
    own: dict[str, set[str]] = {}  # the texts that belong to each query
    for example in dataset.examples:
        if isinstance(example.label, float):
            raise DataError(f"{example.where}: this pair has a score; negatives are for pairs that belong together")
        own.setdefault(example.text, set()).add(str(example.pair))
    documents = list(dict.fromkeys(str(example.pair) for example in dataset.examples))
    searcher = (
        load(model) if Path(model).is_dir() and not (Path(model) / "config.json").is_file() else load_embedder(model)
    )
    queries, place = list(own), {document: i for i, document in enumerate(documents)}
    most = SEARCHED + max(map(len, own.values()))
    similar = most_similar(searcher.embed(queries, query=True), searcher.embed(documents), most)
    lines, n = [], 0
    for query, (order, scores) in zip(queries, similar, strict=True):
        for document in own[query]:
            bound = margin * scores[place[document]]
            best = [documents[i] for i in order if documents[i] not in own[query] and scores[i] <= bound][:negatives]
            lines.append(json.dumps({"query": query, "positive": document, "negatives": best}, ensure_ascii=False))
            n += len(best)
    if not n:
        raise DataError(
            f"{data}: all other texts are nearly as similar as the right one; use a --margin above {margin:g}"
        )
    atomic_text(out, "".join(line + "\n" for line in lines))
    Output(
        [f"{out}: {len(lines):,} pairs with {n:,} negatives among {len(documents):,} texts"],
        {"out": str(out), "pairs": len(lines), "negatives": n, "documents": len(documents)},
    ).show(as_json)
