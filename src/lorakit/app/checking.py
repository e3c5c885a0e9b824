"""What `lorakit check` shows: whether data are fit to train on, and what in them is likely to be wrong."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lorakit.app.printing import Output
from lorakit.app.report.label_errors import Suspect, suspects
from lorakit.data import audit
from lorakit.data.audit import SHOWN, Finding, Parts, label_counts, labels_of, numbers, spread
from lorakit.data.example import Dataset, Example
from lorakit.errors import ConfigError, DataError
from lorakit.inference.adapter_folder import read_side, shipped_folder
from lorakit.inference.predictor import load
from lorakit.models import load_tokenizer
from lorakit.recipe import Recipe, make_recipe
from lorakit.runtime.events import Event, Note
from lorakit.tasks.registry import check_labels, find_labels, make_task
from lorakit.training.prepare import read_part, read_parts, with_usual_pair

MANY = 12  # labels; of more only the most frequent and the rarest are shown
CUT = 0.05  # share of texts that may be cut before it is called a problem


class Tokens(NamedTuple):
    """Lengths in tokens of one part against the limit, and what is cut there."""

    examples: int
    limit: int
    target_limit: int
    lengths: dict[str, float]
    texts: int
    targets: int
    entities: int
    in_windows: int  # texts read in several windows


def check(recipe: Recipe, run: Path | None = None, whole: bool = False) -> Output:
    """Check the parts that a recipe names; `whole` takes data.train as one part, of which nothing is held out.

    Lengths are counted in tokens where the recipe has a base model ("" is none), else in words.

    Raises:
        DataError: a source cannot be read. ConfigError: the run answers another kind of task.
    """
    if run is not None:
        _check_same_kind(run, recipe)
    notes: list[str] = []
    parts, sums, left_out = _read(recipe, whole, notes, by_run=run is not None)
    findings = audit.audit(parts)
    tokens: dict[str, Tokens] = {}
    try:
        every = [example for part in parts.values() for example in part]
        labels = find_labels(recipe.task.name, every, recipe.task.order)
        check_labels(recipe.task.name, every, labels)
        if recipe.model.base:
            tokens = _tokens(recipe, parts, labels)
    except DataError as err:  # one label, no entity, or a label that is none
        findings.insert(0, Finding("labels", 1, str(err), [], True))
    findings = [*_cuts(tokens), *findings]
    facts: dict[str, Any] = {"task": recipe.task.name, "notes": notes, "left_out": left_out, "parts": {}}
    lines = list(notes)
    for name, part in parts.items():
        facts["parts"][name] = _part_facts(part, tokens.get(name))
        lines += _part_lines(name, facts["parts"][name])
    lines += [line for finding in findings for line in _finding_lines(finding)]
    if run is not None:
        facts["suspects"], told = _suspects(run, parts, sums)
        lines += told
    ending = audit.verdict(findings)
    facts |= {
        "findings": [dataclasses.asdict(f) for f in findings],
        "verdict": ending,
        "ready": ending == "ready to train",
    }
    return Output([*lines, ending], facts)


def _read(recipe: Recipe, whole: bool, notes: list[str], by_run: bool) -> tuple[Parts, dict[str, str], dict[str, int]]:
    def keep(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)

    recipe = recipe if by_run else with_usual_pair(recipe, keep)  # a run says itself whether it takes pairs
    if whole and recipe.data.train is not None:
        dataset: Dataset = read_part(recipe, recipe.data.train, "train", keep)
        left_out = {dataset.source: dataset.left_out} if dataset.left_out else {}
        return {"train": dataset.examples}, {dataset.source: dataset.sha256}, left_out
    return read_parts(recipe, keep)


def _tokens(recipe: Recipe, parts: Parts, labels: tuple[str, ...]) -> dict[str, Tokens]:
    """Lengths in tokens, by part."""
    tokenizer, limit = load_tokenizer(recipe.model.base, recipe.task.info.model_kind, recipe.model.revision)
    limit = recipe.data.max_length or limit
    task = make_task(recipe.task, tokenizer, labels, limit)
    found = {}
    for name, part in parts.items():
        items = task.encode(part)
        lengths = [max(len(item["input_ids"]) for item in own) for own in items]
        windows = sum(len(own) > 1 for own in items)
        target_limit = recipe.task.max_target_length
        found[name] = Tokens(len(part), limit, target_limit, spread(lengths), *task.cut(part, items), windows)
    return found


def _cuts(tokens: Mapping[str, Tokens]) -> list[Finding]:
    """Parts of which so much is cut that it matters."""
    return [
        Finding(f"cut in {name}", of_part.texts + of_part.targets, f"{name}: {_cut(of_part)}", [], True)
        for name, of_part in tokens.items()
        if of_part.entities or of_part.targets or of_part.texts > CUT * of_part.examples
    ]


def _cut(tokens: Tokens) -> str:
    told = [f"texts cut at {tokens.limit} tokens: {tokens.texts:,} ({tokens.texts / tokens.examples:.1%})"]
    told += [f"entities lost: {tokens.entities:,}"] * bool(tokens.entities)
    told += [f"targets cut at {tokens.target_limit}: {tokens.targets:,}"] * bool(tokens.targets)
    return ", ".join(told)


def _part_facts(part: Sequence[Example], tokens: Tokens | None) -> dict[str, Any]:
    values = numbers(part)
    return {
        "examples": len(part),
        "labels": label_counts(part),
        "entities": sum(label_counts(part).values()) if any(example.words for example in part) else None,
        "without_label": 0 if values else sum(not labels_of(example) for example in part),
        "numbers": spread(values) if values else None,
        "words": spread([audit.words(example) for example in part]),
        "tokens": None if tokens is None else tokens._asdict(),
    }


def _part_lines(name: str, facts: dict[str, Any]) -> list[str]:
    lines = [f"{name}: {facts['examples']:,} examples"]
    if facts["labels"]:
        total, what = (facts["entities"], "entity types") if facts["entities"] else (facts["examples"], "labels")
        balance = _balance(facts["labels"], total)
        lines.append(f"  {len(facts['labels'])} {what}: {balance}; none: {facts['without_label']:,}")
    for what in ("numbers", "words"):
        if facts[what]:
            lines.append(f"  {what}: {_spread(facts[what])}")
    if facts["tokens"]:
        tokens = Tokens(**facts["tokens"])
        windows = f", read in several windows: {tokens.in_windows:,}" if tokens.in_windows else ""
        lines.append(f"  tokens: {_spread(tokens.lengths)}; {_cut(tokens)}{windows}")
    return lines


def _balance(counts: dict[str, int], total: int) -> str:
    shown = [f"{label}: {count:,} ({count / total:.1%})" for label, count in counts.items()]
    if len(shown) > MANY:
        shown = [*shown[: MANY // 2], f"... {len(shown) - MANY} more ...", *shown[-MANY // 2 :]]
    return "; ".join(shown)


def _spread(values: dict[str, float]) -> str:
    return f"median {values['median']:g}, 95 % up to {values['p95']:g}, from {values['min']:g} to {values['max']:g}"


def _finding_lines(finding: Finding) -> list[str]:
    more = ["  ..."] if finding.count > len(finding.places) > 0 else []
    return [
        f"{'problem' if finding.is_problem else 'note'}: {finding.text}",
        *(f"  {place}" for place in finding.places),
        *more,
    ]


# With a run


def recipe_of_run(run: Path, source: str, changes: Sequence[str], options: Mapping[str, str | None]) -> Recipe:
    """How a run would read a source: its task, columns, base model and length limit, but for what is named otherwise."""
    if options["task"] is not None:
        raise ConfigError("--task goes without --run, which says what its task is")
    side = read_side(shipped_folder(run))
    columns = {
        **dataclasses.asdict(side.columns),
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


def _check_same_kind(run: Path, recipe: Recipe) -> None:
    trained = read_side(shipped_folder(run)).task
    if trained.info.wants != recipe.task.info.wants:
        raise ConfigError(f"--run {run} was trained for {trained.name}, the data are for {recipe.task.name}")


def _suspects(run: Path, parts: Parts, sums: dict[str, str]) -> tuple[dict[str, Any] | None, list[str]]:
    """Suspected label errors of each part, and lines that tell them; without cleanlab a line that says so."""
    predictor = load(run)
    seen = set(predictor.side.data.values()) & set(sums.values())
    facts: dict[str, Any] = {}
    lines = []
    for name, part in parts.items():
        try:
            found = suspects(predictor, part)
        except ConfigError as err:
            return None, [f"note: {err}"]
        facts[name] = [suspect._asdict() for suspect in found]
        lines += _suspect_lines(name, found)
    if seen:
        lines.append(
            f"note: {run} has used these data, to train or to choose its best checkpoint; errors that it has learned "
            "by heart are not suspected: a run over other examples finds more"
        )
    return facts, lines


def _suspect_lines(name: str, found: Sequence[Suspect]) -> list[str]:
    lines = [f"suspected label errors in {name}: {len(found):,}"]
    for suspect in found[:SHOWN]:
        claim = f"{suspect.given!r}, the run says {suspect.suggested!r} ({suspect.probability:.0%})"
        lines.append(f"  {suspect.where}: {claim}: {suspect.text[:100]!r}")
    swaps = Counter((suspect.given, suspect.suggested) for suspect in found).most_common(3)
    if len(found) > SHOWN:
        lines.append("  most often: " + ", ".join(f"{a!r} for {b!r} {n}x" for (a, b), n in swaps))
    return lines
