"""The model card of what a run ships: README.md beside the adapter, filled from the run folder alone.

Names that come from data (labels, files, columns) reach it as code only, where neither Markdown nor HTML means anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from lorakit.app.report.page import METHODS, fact_rows, hash_rows, number, verdict
from lorakit.errors import OutputError
from lorakit.models import KINDS, MINILM_HUB
from lorakit.runtime.files import atomic_text
from lorakit.task_info import TASKS
from lorakit.training.run_files import RunFiles, read_run

FILE = "README.md"
NO_LABELS = "None: it answers with text of its own, or with a number."
TEMPLATE = Path(__file__).with_name("card.md.jinja")
LONGEST = 120  # characters of a name that the card shows
RARE = 10  # validation examples of a label below which the card warns of it
PIPELINES = {"SEQ_CLS": "text-classification", "TOKEN_CLS": "token-classification", "SEQ_2_SEQ_LM": ""}
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def write_card(run: Path) -> Path:
    """Write README.md into what a run ships; errors as `read_shipped`, and an OutputError where it cannot be written."""
    files = read_shipped(run)
    atomic_text(files.shipped / FILE, str(card_of(files)))
    return files.shipped / FILE


def read_shipped(run: Path) -> RunFiles:
    """The files of a run that ships something.

    Raises:
        OutputError: it is no finished run, or a file in it is damaged.
    """
    files = read_run(run)
    if files.side is None:
        raise OutputError(f"{files.shipped / 'lorakit.json'}: not there, so nothing is known of what the run ships")
    return files


def card_of(run: RunFiles) -> ModelCard:
    """What the card of a run says."""
    assert run.side is not None
    found = verdict(run)
    task, kind = _task(run)
    pipeline = PIPELINES[kind.peft_task_type] if kind else ""
    full, mean = run.scores.method == "full", run.side.pooling == "mean"
    data = ModelCardData(
        base_model=_hub_base(run) or None,
        datasets=_hub_data(run) or None,
        eval_results=list(_results(run, pipeline or "text2text-generation")),
        library_name=("sentence-transformers" if mean else "transformers") if full else "peft",
        metrics=[run.scores.metric],
        model_name=_plain(run.name),
        pipeline_tag=pipeline or None,
        tags=["lorakit", *([] if full else ["lora"])],
    )
    card: ModelCard = ModelCard.from_template(
        data,
        template_str=_template(),
        title=code(run.name),
        method=METHODS.get(run.scores.method, run.scores.method),
        task=task.replace("_", " "),
        base=code(_hub_base(run) or Path(run.side.base.name).name),
        full=full,
        verdict=found,
        sentences=" ".join(map(escaped, found.sentences)),
        scores=list(_scores(run)),
        tested=bool(run.scores.test),
        by_label=list(_by_label(run)),
        code=_fenced(_snippet(run), "python") if kind and run.scores.method != "head" else "",
        labels=_fenced(json.dumps(run.side.labels, ensure_ascii=False), "json") if run.side.labels else NO_LABELS,
        limits=list(_limits(run)),
        facts=[(name, code(str(value))) for name, value in _facts(run)],
        recipe=_fenced(tomli_w.dumps(_public(run.recipe)), "toml"),
        hashes=[(code(_without_folder(name)), code(value)) for name, value in hash_rows(run)],
    )
    return card


def code(text: str) -> str:
    """A text as Markdown's inline code, on one line and fit for a cell of a table."""
    text = _plain(text)[:LONGEST] or " "
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}".replace("|", "\\|")


def escaped(text: str) -> str:
    """A text in which nothing is Markdown or HTML."""
    return re.sub(r"([\\`*_\[\]<>|#~&!])", r"\\\1", _plain(text))


def _fenced(text: str, language: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def _plain(text: str) -> str:
    """A text without line breaks, control characters and signs that turn the writing round."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _template() -> str:
    """jinja2 as huggingface_hub calls it keeps the line breaks of blocks; here they are taken out."""
    text = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"(?m)^({%.*%})\n", r"\1", text)


def _task(run: RunFiles) -> tuple[str, Any]:
    name = str(run.section("task").get("name", ""))
    return name, KINDS[TASKS[name].model_kind] if name in TASKS else None


def _hub_base(run: RunFiles) -> str:
    """What the base model is called on the hub, where it is there."""
    assert run.side is not None
    name = run.side.base.name
    if name == "minilm":
        return MINILM_HUB
    return name if HUB_ID.fullmatch(name) and not Path(name).exists() else ""


def _hub_data(run: RunFiles) -> list[str]:
    assert run.side is not None
    names = (re.split("[:@#]", source)[0] for source in run.side.data if not Path(source).suffix)
    return sorted({name for name in names if HUB_ID.fullmatch(name) and not Path(name).exists()})


def _without_folder(name: str) -> str:
    prefix = "base model " if name.startswith("base model ") else ""
    return prefix + _file_name(name.removeprefix(prefix))


def _file_name(source: str) -> str:
    """A local file by its name alone: where it lies is nobody's business."""
    return Path(source).name if source.startswith(("/", "~", ".")) else source


def _results(run: RunFiles, task: str) -> Iterator[EvalResult]:
    parts = {"validation": run.scores.values, "test": run.scores.test}
    data = run.section("data")
    for part, scores in parts.items():
        source = data.get(part) or data.get("train")
        for name, value in scores.items():
            if not isinstance(value, float):
                continue
            yield EvalResult(
                task_type=task,
                dataset_type="text",
                dataset_name=_plain(_file_name(str(source))) + ("" if data.get(part) else f", a share for {part}"),
                dataset_split=part,
                metric_type=name,
                metric_value=value,
                metric_args=_interval(run, part, name),
            )


def _interval(run: RunFiles, part: str, name: str) -> dict[str, Any] | None:
    intervals = run.scores.intervals if part == "validation" else run.scores.test.get("intervals", {})
    return {"confidence_interval_95": list(intervals[name])} if name in intervals else None


def _scores(run: RunFiles) -> Iterator[Sequence[str]]:
    for name, value in run.scores.values.items():
        low, high = run.scores.intervals.get(name, (None, None))
        row = [name, number(value), "" if low is None else f"{number(low)} to {number(high)}"]
        test = run.scores.test.get(name)
        yield [*row, number(test) if isinstance(test, float) else ""] if run.scores.test else row


def _by_label(run: RunFiles) -> Iterator[list[str]]:
    for label, row in run.scores.by_label.items():
        parts = [f"{row.get(key, 0):.3f}" for key in ("precision", "recall", "f1")]
        yield [code(label), *parts, f"{row.get('support', 0):,.0f}"]


def _snippet(run: RunFiles) -> str:
    """Python that answers without lorakit, by transformers and peft."""
    assert run.side is not None
    _, kind = _task(run)
    if run.side.pooling == "mean":
        return _snippet_of_mean(run, kind.problem_type)
    auto, pipeline = kind.auto_class, PIPELINES[kind.peft_task_type]
    heads = [] if not pipeline else _head_options(run)
    full = run.scores.method == "full"
    base = "FOLDER" if full else _hub_base(run) or "BASE"
    options = "".join(f", {option}" for option in ([] if full else heads))
    lines = [f"from transformers import {auto}, AutoTokenizer{', pipeline' if pipeline else ''}", ""]
    labels = json.dumps(run.side.labels, ensure_ascii=False)
    if heads and run.side.labels and not full:
        lines.append(f"labels = {labels}")
    lines.append(f"model = {auto}.from_pretrained({json.dumps(base)}{options})")
    if not full:
        lines = ["from peft import PeftModel", *lines, 'model = PeftModel.from_pretrained(model, "FOLDER").eval()']
    lines.append('tokenizer = AutoTokenizer.from_pretrained("FOLDER")')
    if pipeline:
        limit = f", truncation=True, max_length={run.side.max_length}" if pipeline == "text-classification" else ""
        lines.append(f'print(pipeline("{pipeline}", model=model, tokenizer=tokenizer)("A text."{limit}))')
    else:
        prefix = json.dumps(str(run.section("task").get("prefix", "")), ensure_ascii=False)
        lines += [
            f'ids = tokenizer({prefix} + "A text.", return_tensors="pt")',
            "print(tokenizer.batch_decode(model.generate(**ids, max_new_tokens=128), skip_special_tokens=True))",
        ]
    return "\n".join(lines)


def _snippet_of_mean(run: RunFiles, problem_type: str | None) -> str:
    """The same for a classifier over the mean of the tokens, which no class of transformers has."""
    assert run.side is not None
    side = run.side
    outputs = side.task.info.outputs(side.labels)
    names = json.dumps(side.labels, ensure_ascii=False)
    rates = "sigmoid()" if problem_type else "softmax(-1)"
    shown = "logits" if outputs != side.labels else f"dict(zip({names}, logits.{rates}[0].tolist()))"
    if run.scores.method == "full":
        lines = [
            "from sentence_transformers import SentenceTransformer",
            "",
            'logits = SentenceTransformer("FOLDER").encode(["A text."], convert_to_tensor=True)',
        ]
    else:
        lines = [
            "import torch",
            "from peft import PeftModel",
            "from transformers import AutoModel, AutoTokenizer",
            "",
            f"model = AutoModel.from_pretrained({json.dumps(_hub_base(run) or 'BASE')})",
            f"model.classifier = torch.nn.Linear(model.config.hidden_size, {len(outputs)})  # the adapter brings its values",
            'model = PeftModel.from_pretrained(model, "FOLDER").eval()',
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
            "limit = {" + f'"truncation": True, "max_length": {side.max_length}' + "}",
            'batch = tokenizer(["A text."], padding=True, return_tensors="pt", **limit)',
            'mask = batch["attention_mask"][..., None]',
            "with torch.no_grad():",
            "    hidden = model(**batch).last_hidden_state",
            "    logits = model.classifier((hidden * mask).sum(1) / mask.sum(1))",
        ]
    return "\n".join([*lines, f"print({shown})"])


def _head_options(run: RunFiles) -> list[str]:
    assert run.side is not None
    labels, outputs = run.side.labels, run.side.task.info.outputs(run.side.labels)
    kind = KINDS[run.side.task.info.model_kind]
    if outputs != labels:
        regression = ['problem_type="regression"'] if kind.problem_type == "regression" else []
        return [f"num_labels={len(outputs)}", *regression]
    multi = ['problem_type="multi_label_classification"'] if kind.problem_type else []
    return ["num_labels=len(labels)", "id2label=dict(enumerate(labels))", *multi]


def _limits(run: RunFiles) -> Iterator[str]:
    assert run.side is not None
    windowed = run.side.task.info.reads_windows
    yield (
        f"Texts are read {'in windows of' if windowed else 'up to'} {run.side.max_length} tokens"
        f"{'.' if windowed else '; what is longer is cut off.'}"
    )
    if run.side.labels:
        yield f"It knows the {len(run.side.labels)} labels above and no others, whatever the text is about."
    sizes = ", ".join(f"{n:,} for {part.replace('train', 'training')}" for part, n in run.scores.examples.items())
    yield f"It has seen the examples of its data sets and no others: {sizes}."
    rare = [label for label, row in run.scores.by_label.items() if row.get("support", 0) < RARE]
    if rare:
        shown = ", ".join(code(label) for label in rare[:8])
        more = ", ..." if len(rare) > 8 else ""
        yield f"Fewer than {RARE} validation examples each, so little is known of how well it does there: {shown}{more}."
    if run.section("task").get("crf"):
        yield "Its CRF layer is lorakit's: peft and transformers answer without it, by the best tag of each word."


def _facts(run: RunFiles) -> Iterator[tuple[str, Any]]:
    for name, value in fact_rows(run):
        yield name, _without_folder(str(value)) if name == "base model" else value


def _public(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with local files by name alone, and without what concerns this machine."""
    sections = {name: dict(table) for name, table in recipe.items() if isinstance(table, Mapping) and name != "output"}
    for name, keys in (("data", ("train", "validation", "test")), ("model", ("base",))):
        table = sections.get(name, {})
        table.update({key: _file_name(table[key]) for key in keys if isinstance(table.get(key), str)})
    return sections
