"""What `lorakit check` shows: whether data are fit to train on, and likely mistakes in them."""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lorakit.app.printing import Output
from lorakit.data import audit
from lorakit.data.audit import SHOWN, Finding, Parts, label_counts, labels_of, numbers, spread
from lorakit.data.example import Dataset, Example
from lorakit.errors import ConfigError, DataError
from lorakit.inference.adapter_folder import read_side, shipped_folder
from lorakit.inference.answer import predict_all
from lorakit.inference.predictor import Predictor, load
from lorakit.models import load_tokenizer
from lorakit.recipe import Recipe, make_recipe
from lorakit.runtime.events import Event, Note
from lorakit.tasks.registry import check_labels, find_labels, make_task
from lorakit.tasks.token_classification import TokenClassification
from lorakit.training.parts import read_part, read_parts, with_usual_columns

MANY = 12  # labels; beyond it only the most frequent and the rarest are shown
CUT = 0.05  # share of cut texts from which it counts as a problem


class Tokens(NamedTuple):
    """Lengths in tokens of one part, the limit, and what is cut."""

    examples: int
    read: int  # texts, of which an example may have several
    limit: int
    target_limit: int
    lengths: dict[str, float]
    texts: int
    targets: int
    entities: int
    in_windows: int  # texts read in several windows


def check(recipe: Recipe, run: Path | None = None, whole: bool = False) -> Output:
    """Check the parts that a recipe names; with `whole` nothing of data.train is held out.

    Lengths are counted in tokens if the recipe has a base model ("" is none), else in words.

    Raises:
        DataError: a source cannot be read. ConfigError: the run was trained for another task.
    """
    notes: list[str] = []

    def keep(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)

    if run is None:
        recipe = with_usual_columns(recipe, keep)  # a run knows whether it takes pairs
    else:
        trained = read_side(shipped_folder(run)).task
        if trained.info.wants != recipe.task.info.wants:
            raise ConfigError(f"--run {run} was trained for {trained.name}, but the data is for {recipe.task.name}")
    parts: Parts
    if whole and recipe.data.train is not None:
        dataset: Dataset = read_part(recipe, recipe.data.train, "train", keep)
        parts, sums = {"train": dataset.examples}, {dataset.source: dataset.sha256}
        left_out = {dataset.source: dataset.left_out} if dataset.left_out else {}
    else:
        parts, sums, left_out = read_parts(recipe, keep)
    findings = audit.audit(parts)
    tokens: dict[str, Tokens] = {}
    try:
        every = [example for part in parts.values() for example in part]
        labels = find_labels(recipe.task.name, every, recipe.task.order)
        check_labels(recipe.task.name, every, labels)
        if recipe.model.base:
            tokens = _tokens(recipe, parts, labels)
    except DataError as err:  # a single label, no entity, or an invalid label
        findings.insert(0, Finding("labels", 1, str(err), [], True))
    findings = [  # parts with many cut texts
        Finding(f"cut in {name}", part_tokens.texts + part_tokens.targets, f"{name}: {_cut(part_tokens)}", [], True)
        for name, part_tokens in tokens.items()
        if part_tokens.entities or part_tokens.targets or part_tokens.texts > CUT * part_tokens.read
    ] + findings
    of_parts = {name: _part_facts(part, tokens.get(name)) for name, part in parts.items()}
    facts: dict[str, Any] = {"task": recipe.task.name, "notes": notes, "left_out": left_out, "parts": of_parts}
    lines = [*notes, *(line for name, of_part in of_parts.items() for line in _part_lines(name, of_part))]
    for finding in findings:
        lines.append(f"{'problem' if finding.is_problem else 'note'}: {finding.text}")
        lines += [f"  {place}" for place in finding.places]
        lines += ["  ..."] * (finding.count > len(finding.places) > 0)
    if run is not None:
        facts["suspects"], of_run = _suspects(run, parts, sums)
        lines += of_run
    ending = audit.verdict(findings)
    facts["findings"] = [dataclasses.asdict(finding) for finding in findings]
    return Output([*lines, ending], {**facts, "verdict": ending, "ready": ending == "ready to train"})


def _tokens(recipe: Recipe, parts: Parts, labels: tuple[str, ...]) -> dict[str, Tokens]:
    """Lengths in tokens, by part."""
    tokenizer, limit = load_tokenizer(recipe.model.base, recipe.task.info.model_kind, recipe.model.revision)
    limit = recipe.data.max_length or limit
    task = make_task(recipe.task, tokenizer, labels, limit)
    counts = {}
    for name, part in parts.items():
        items = task.encode(part)
        lengths = spread([max(len(item["input_ids"]) for item in own) for own in items])
        info = recipe.task.info
        windows = sum(len(own) > 1 for own in items) if info.reads_windows else 0
        target_limit = recipe.task.max_target_length
        counts[name] = Tokens(
            len(part), info.texts_read(items), limit, target_limit, lengths, *task.cut(part, items), windows
        )
    return counts


def _cut(tokens: Tokens) -> str:
    lost = f", entities lost: {tokens.entities:,}" if tokens.entities else ""
    lost += f", targets cut at {tokens.target_limit}: {tokens.targets:,}" if tokens.targets else ""
    return f"texts cut at {tokens.limit} tokens: {tokens.texts:,} ({tokens.texts / tokens.read:.1%}){lost}"


def _part_facts(part: Sequence[Example], tokens: Tokens | None) -> dict[str, Any]:
    values, counts = numbers(part), label_counts(part)
    return {
        "examples": len(part),
        "labels": counts,
        "entities": sum(counts.values()) if any(example.words for example in part) else None,
        "without_label": 0 if values else sum(not labels_of(example) for example in part),
        "numbers": spread(values) if values else None,
        "words": spread([audit.words(example) for example in part]),
        "tokens": None if tokens is None else tokens._asdict(),
    }


def _part_lines(name: str, facts: dict[str, Any]) -> Iterator[str]:
    yield f"{name}: {facts['examples']:,} examples"
    if facts["labels"]:
        total, what = (facts["entities"], "entity types") if facts["entities"] else (facts["examples"], "labels")
        shown = [f"{label}: {count:,} ({count / total:.1%})" for label, count in facts["labels"].items()]
        if (n := len(shown)) > MANY:
            shown = [*shown[: MANY // 2], f"... {n - MANY} more ...", *shown[-MANY // 2 :]]
        yield f"  {n} {what}: {'; '.join(shown)}; none: {facts['without_label']:,}"
    tokens = facts["tokens"] and Tokens(**facts["tokens"])
    for what, of in (("numbers", facts["numbers"]), ("words", facts["words"]), ("tokens", tokens and tokens.lengths)):
        if of:
            text = f"  {what}: median {of['median']:g}, 95 % up to {of['p95']:g}, from {of['min']:g} to {of['max']:g}"
            windows = f", read in several windows: {tokens.in_windows:,}" if tokens and tokens.in_windows else ""
            yield f"{text}; {_cut(tokens)}{windows}" if what == "tokens" else text


# With a run


def recipe_of_run(run: Path, source: str, changes: Sequence[str], options: Mapping[str, str | None]) -> Recipe:
    """The recipe by which a run would read a source: its task, columns, base model and length limit, unless others are named."""
    if options["task"] is not None:
        raise ConfigError("use either --task or --run; a run has a task already")
    side = read_side(shipped_folder(run))
    columns = {
        **dataclasses.asdict(side.columns),
        "encoding": side.columns.encoding_of(source),
        **{role: options[role] for role in ("text", "label") if options[role]},
    }
    raw: dict[str, dict[str, Any]] = {
        "model": {"base": options["model"] or side.base.name},
        "data": {"train": source, **{key: value for key, value in columns.items() if value is not None}},
        "task": side.task.model_dump(),
    }
    if options["model"] is None:
        raw["model"]["revision"], raw["data"]["max_length"] = side.base.revision, side.max_length
    return make_recipe(raw, changes, where="command line")


def _suspects(run: Path, parts: Parts, sums: dict[str, str]) -> tuple[dict[str, Any] | None, list[str]]:
    """Suspected label errors of each part, as facts and as lines; without cleanlab a line that says so."""
    predictor = load(run)
    facts: dict[str, Any] = {}
    lines = []
    for name, part in parts.items():
        try:
            doubted = suspects(predictor, part)
        except ConfigError as err:
            return None, [f"note: {err}"]
        facts[name] = [suspect._asdict() for suspect in doubted]
        lines.append(f"suspected label errors in {name}: {len(doubted):,}")
        for each in doubted[:SHOWN]:
            claim = f"{each.given!r}, the run says {each.suggested!r} ({each.probability:.0%})"
            lines.append(f"  {each.where}: {claim}: {each.text[:100]!r}")
        if len(doubted) > SHOWN:
            swaps = Counter((each.given, each.suggested) for each in doubted).most_common(3)
            lines.append("  most often: " + ", ".join(f"{a!r} for {b!r} {n}x" for (a, b), n in swaps))
    if set(predictor.side.data.values()) & set(sums.values()):
        lines.append(
            f"note: {run} was trained on this data, or chose its best checkpoint with it, so it may have memorised "
            "label errors; a run on other examples finds more"
        )
    return facts, lines


# Labels that a trained run finds unlikely


Place = tuple[str, str]  # file and line of a label, and its text


class Suspect(NamedTuple):
    """A label that is likely wrong: where it is, its text, the label, the run's label and its probability."""

    where: str
    text: str
    given: str
    suggested: str
    probability: float


def suspects(predictor: Predictor, examples: Sequence[Example]) -> list[Suspect]:
    """The suspected label errors, the most suspect first: a text's label, one of several labels, or a word's tag.

    Raises:
        ConfigError: cleanlab is not installed, or the task gives no probability of each label.
    """
    if find_spec("cleanlab") is None:
        raise ConfigError("suspected label errors need an extra: pip install 'lorakit[cleanlab]'")
    check_labels(predictor.side.task.name, examples, predictor.side.labels)
    if isinstance(predictor.task, TokenClassification):
        return _of_words(predictor, examples)
    answers = [predictor.task.to_json(e, a) for e, a in zip(examples, predictor.answers(examples), strict=True)]
    if not predictor.task.info.names_labels or not all("probabilities" in answer for answer in answers):
        raise ConfigError(
            f"{predictor.side.task.name}: label errors can only be found for tasks that give each label a probability"
        )
    gold = [labels_of(example) for example in examples]
    places = [(example.where, example.text) for example in examples]
    several = "labels" in answers[0]
    return unlikely_labels(places, gold if several else [row[0] for row in gold], [a["probabilities"] for a in answers])


def _of_words(predictor: Predictor, examples: Sequence[Example]) -> list[Suspect]:
    """Tags of words, all words in a row as one table (Wang and Mueller 2022, arXiv:2210.03920); of a CRF what it is fed."""
    raws = predict_all(predictor.model, predictor.task, predictor.task.encode(examples), predictor.device)
    table = torch.cat([read.log_p for of_example in raws for read in of_example]).softmax(-1).numpy()  # (words, C)
    places = [(e.where, f"{word} (word {i})") for e in examples for i, word in enumerate(e.words, start=1)]
    return _of_one_label(places, [tag for e in examples for tag in e.tags], table, predictor.side.labels)


def unlikely_labels(
    places: Sequence[Place], gold: Sequence[Any], probabilities: Sequence[Mapping[str, float]]
) -> list[Suspect]:
    """The suspects, from each row's label, or collection of labels, and the probability of every label.

    By confident learning (Northcutt et al. 2021, arXiv:1911.00068), as cleanlab does it.
    """
    labels = list(probabilities[0])
    table = np.array([[row[label] for label in labels] for row in probabilities])
    if isinstance(gold[0], str):
        return _of_one_label(places, gold, table, labels)
    doubted = []
    for label, there in zip(labels, table.T, strict=True):  # each label is a yes-or-no question
        names = (f"not {label}", label)
        doubted += _of_one_label(places, [names[label in row] for row in gold], np.stack([1 - there, there], 1), names)
    return sorted(doubted, key=lambda suspect: -suspect.probability)


def _of_one_label(places: Sequence[Place], gold: Sequence[str], table: Any, labels: Collection[str]) -> list[Suspect]:
    """Shapes: N places and labels, table (N, C)."""
    from cleanlab.filter import find_label_issues

    names = list(labels)
    numbers = np.array([names.index(label) for label in gold])
    with warnings.catch_warnings():  # of labels with too few examples to judge, which `check` lists itself
        warnings.filterwarnings("ignore", message="May not flag all label issues", category=UserWarning)
        rows = find_label_issues(numbers, table, return_indices_ranked_by="self_confidence", n_jobs=1)
    return [Suspect(*places[i], gold[i], names[int(table[i].argmax())], float(table[i].max())) for i in map(int, rows)]
