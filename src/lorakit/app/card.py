"""The model card of a run: README.md beside its adapter, filled from the run folder alone.

Names from data (labels, files, columns) are written as inline code, in which neither Markdown nor HTML is interpreted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import tomli_w
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from lorakit.app.report.page import fact_rows, hash_rows, label_rows, score_table, template, verdict
from lorakit.errors import OutputError
from lorakit.model_files import MINILM_HUB
from lorakit.models import KINDS
from lorakit.runtime.files import atomic_text
from lorakit.training.run_files import RunFiles, read_run

FILE = "README.md"
LONGEST = 120  # the most characters of a name to show
RARE = 10  # the card warns of labels with fewer validation examples
PIPELINES = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "SEQ_2_SEQ_LM": "",
    "FEATURE_EXTRACTION": "sentence-similarity",
    None: "multiple-choice",
}
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def write_card(run: Path) -> Path:
    """Write README.md beside a run's adapter or model; errors as `read_shipped`, and an OutputError if it cannot be written."""
    files = read_shipped(run)
    atomic_text(files.shipped / FILE, str(card_of(files)))
    return files.shipped / FILE


def read_shipped(run: Path) -> RunFiles:
    """The files of a finished run.

    Raises:
        OutputError: it is not a finished run, or a file in it is damaged.
    """
    files = read_run(run)
    if files.side is None:
        raise OutputError(
            f"{files.shipped / 'lorakit.json'}: missing; without it the contents of the adapter are unknown"
        )
    return files


def card_of(run: RunFiles) -> ModelCard:
    """The card of a run."""
    assert run.side is not None
    side, full = run.side, run.scores.method == "full"
    kind, outputs = KINDS[side.task.info.model_kind], side.task.info.outputs(side.labels)
    pipeline, base = PIPELINES[kind.peft_task_type], side.base.name
    if side.task.info.model_kind == "reranker":
        pipeline = "text-ranking"
    is_sentence = side.pooling == "mean" or side.task.info.model_kind == "embedding"
    hub_base = MINILM_HUB if base == "minilm" else base if _is_on_hub(base) else ""
    names = (re.split("[:@#]", source)[0] for source in side.data if not Path(source).suffix)
    data = ModelCardData(
        base_model=hub_base or None,
        datasets=sorted({name for name in names if _is_on_hub(name)}) or None,
        eval_results=list(_results(run, pipeline or "text2text-generation")),
        library_name=("sentence-transformers" if is_sentence else "transformers") if full else "peft",
        metrics=[run.scores.metric],
        model_name=_plain(run.name),
        pipeline_tag=pipeline or None,
        tags=["lorakit", *([] if full else ["lora"])],
    )
    recipe = {name: dict(table) for name, table in run.recipe.items() if isinstance(table, Mapping)}
    recipe.pop("output", None)  # and what else is of this machine: folders of local files
    for name, keys in (("data", ("train", "validation", "test")), ("model", ("base", "adapter"))):
        table = recipe.get(name, {})
        table.update({key: _file_name(table[key]) for key in keys if isinstance(table.get(key), str)})
    text = template(
        "card.md.jinja",
        code=code,
        escaped=escaped,
        fenced=_fenced,
        file_name=_file_name,
        json=partial(json.dumps, ensure_ascii=False),
    ).render(
        card_data=data.to_yaml(),
        run=run,
        side=side,
        full=full,
        kind=kind,
        pipeline=pipeline,
        hub_base=hub_base,
        base_name=Path(base).name,
        outputs=outputs,
        verdict=verdict(run),
        scores=score_table(run).rows,
        by_label=label_rows(run),
        facts=list(fact_rows(run)),
        hashes=list(hash_rows(run)),
        rare=[label for label, row in run.scores.by_label.items() if row.get("support", 0) < RARE],
        RARE=RARE,
        recipe=tomli_w.dumps(recipe),
    )
    return ModelCard(text)


def code(text: str) -> str:
    """A text as Markdown inline code, on one line and safe in a table cell."""
    text = _plain(text)[:LONGEST] or " "
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}".replace("|", "\\|")


def escaped(text: str) -> str:
    """A text with Markdown and HTML escaped."""
    return re.sub(r"([\\`*_\[\]<>|#~&!])", r"\\\1", _plain(text))


def _fenced(text: str, language: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def _plain(text: str) -> str:
    """A text without line breaks, control characters and characters that change the writing direction."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _is_on_hub(name: str) -> bool:
    return bool(HUB_ID.fullmatch(name)) and not Path(name).exists()


def _file_name(source: str) -> str:
    """A local file by its name, without its folder, which is private."""
    return Path(source).name if source.startswith(("/", "~", ".")) else source


def _results(run: RunFiles, task: str) -> Iterator[EvalResult]:
    data = run.section("data")
    tested = {name: value for name, value in run.scores.test.items() if isinstance(value, float)}
    for part, scores, intervals in (
        ("validation", run.scores.values, run.scores.intervals),
        ("test", tested, run.scores.test.get("intervals", {})),
    ):
        source = _plain(_file_name(str(data.get(part) or data.get("train"))))
        for name, value in scores.items():
            yield EvalResult(
                task_type=task,
                dataset_type="text",
                dataset_name=source + ("" if data.get(part) else f", a share for {part}"),
                dataset_split=part,
                metric_type=name,
                metric_value=value,
                metric_args={"confidence_interval_95": list(intervals[name])} if name in intervals else None,
            )
