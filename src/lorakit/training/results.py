"""The results of a run: scores, and the answers that were scored."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np

from lorakit.data.example import columns_of
from lorakit.data.tags import entities
from lorakit.errors import NumericsError, OutputError
from lorakit.inference.adapter_folder import ADAPTER, MODEL, write_side
from lorakit.inference.predictor import Predictor, load
from lorakit.inference.side import Base, Side
from lorakit.lora import BaseInfo, save_adapter
from lorakit.models import save_model, versions
from lorakit.runtime.device import DTYPE_NAMES, machine_name, peak_memory
from lorakit.runtime.files import atomic_file, atomic_folder, atomic_json, atomic_text
from lorakit.tasks.metrics.bootstrap import Scores, intervals, resample
from lorakit.tasks.registry import layout_of
from lorakit.tasks.token_classification import entity_dicts
from lorakit.training.prepare import Prepared
from lorakit.training.progress import History
from lorakit.training.run_files import VECTORS, About, sampled, write_resamples

MAPPED = 500  # validation examples whose vectors the report shows
SAMPLES = 20  # validation examples shown in samples.jsonl


@dataclass(frozen=True)
class Result:
    """A run's folder and scores: those of scores.json, or for a paused run those of its last evaluation.

    >>> result = lorakit.train(model="minilm", data="reviews.csv", epochs=1, folder="runs/shown")
    >>> result.scores["metric"]
    'accuracy'
    >>> result.predict("What a film!").keys()
    dict_keys(['text', 'label', 'score', 'probabilities'])
    >>> result.report()
    PosixPath('runs/shown/report.html')
    """

    folder: Path
    scores: Scores
    is_paused: bool = False

    @cached_property
    def predictor(self) -> Predictor:
        """The trained model, loaded on first use, as by `lorakit.load`."""
        return load(self.folder)

    @overload
    def predict(self, texts: str) -> dict[str, Any]: ...  # type: ignore[overload-overlap]  # a str is a Sequence[str]

    @overload
    def predict(self, texts: Sequence[str | tuple[str, str]]) -> list[dict[str, Any]]: ...

    def predict(self, texts: str | Sequence[str | tuple[str, str]]) -> dict[str, Any] | list[dict[str, Any]]:
        """Predict on each text, in order, as `Predictor.predict` does."""
        return self.predictor.predict(texts)

    def report(self) -> Path:
        """The page that says how good the run is and where it is wrong, one file for a browser.

        Raises:
            OutputError: there is none: the run is paused, or one of several seeds.
        """
        if not (page := self.folder / "report.html").is_file():
            raise OutputError(f"{page} does not exist; `lorakit report {self.folder}` writes it for a finished run")
        return page

    def __repr__(self) -> str:
        name = self.scores.get("metric", "")
        ends = self.scores.get("intervals", {}).get(name)
        between = f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else ""
        score = f", {name} {self.scores[name]:.4f}{between}" if name in self.scores else ""
        return f"Result({str(self.folder)!r}{score}{', paused' if self.is_paused else ''})"


def write_results(
    folder: Path, prepared: Prepared, history: History, answers: Sequence[Any], test_answers: Sequence[Any]
) -> Result:
    """Tune the task on the validation answers, then write the adapter or model, scores and answers.

    Raises:
        NumericsError: an answer is not finite.
    """
    part = prepared.parts["validation"]
    task, evaluation = prepared.task, prepared.task.evaluate(part.examples, answers)
    if evaluation.tuned:
        task, prepared = (
            task.with_tuned(evaluation.tuned),
            replace(prepared, tuned={**prepared.tuned, **evaluation.tuned}),
        )
        evaluation = task.evaluate(part.examples, answers)
    n, folds = len(part.examples), len(prepared.folds)
    drawn = n - n // folds if folds else n  # as many as a fold's adapter was trained on
    resampled, scores = resample(evaluation.statistics, drawn), evaluation.scores
    write_shipped(folder, prepared, scores)
    write_resamples(folder, sampled(part.examples, prepared.recipe.task.selection_metric, resampled))
    scores["intervals"] = intervals(resampled, drawn)
    if "test" in prepared.parts:
        scores["test"] = task.evaluate(prepared.parts["test"].examples, test_answers).with_intervals()
    about = _about(prepared, history)
    unused = {key for key in ("left_out", "cut", "texts", "base_score") if getattr(about, key) in ({}, None)}
    scores.update(about.model_dump(exclude=unused))
    lines = []
    for example, answer in zip(part.examples, answers, strict=True):
        line = {key: value for key, value in task.to_json(example, answer).items() if key != "embedding"}  # of 8 kB
        line["expected"] = expected = task.expected(example)
        if example.tags and isinstance(expected, str):  # entities written as text
            line["expected_entities"] = entity_dicts(example, entities(example.tags))
        lines.append(line)
    write_lines(folder, "predictions.jsonl", lines)
    write_lines(folder, "samples.jsonl", lines[:SAMPLES])
    if task.info.model_kind == "embedding":
        with atomic_file(folder / VECTORS) as temporary, temporary.open("wb") as file:
            np.save(file, np.stack([answer[:2] for answer in answers[:MAPPED]]).astype(np.float16))
    write_lines(folder, "metrics.jsonl", history.lines)
    atomic_json(folder / "scores.json", scores)
    return Result(folder, scores)


def _about(prepared: Prepared, history: History) -> About:
    """Facts about the run and its cost."""
    counts, metric = prepared.parameters, prepared.recipe.task.selection_metric
    return About(
        metric=metric,
        best_step=history.best_step,
        base_score=history.first_score(metric) if prepared.task.info.contrasts and not prepared.has_new_head else None,
        linear_probe=history.first_score(metric) if prepared.probed else None,
        folds=len(prepared.folds),
        evaluations=sum("validation" in line for line in history.lines),
        last={key: value for key, value in history.last_scores.items() if key != "step"},
        examples={name: len(part.examples) for name, part in prepared.parts.items()},
        left_out=prepared.left_out,
        cut=prepared.cut,
        texts={name: prepared.task.info.texts_read(prepared.parts[name].items) for name in prepared.cut},
        method=prepared.recipe.train.method,
        parameters={
            "trainable": counts.trainable,
            "lora": counts.lora,
            "saved": counts.saved,
            "total": counts.total,
        },
        train_seconds=round(history.seconds, 3),
        saving_seconds=round(history.saving_seconds, 3),
        examples_per_s=round(history.examples / history.seconds, 1) if history.seconds else 0.0,
        padding=round(prepared.plan.padding, 4),
        memory_bytes=peak_memory(prepared.device),
        dtype=str(prepared.dtype).removeprefix("torch."),
        seed=prepared.recipe.train.seed,
        ended=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine_name(prepared.device),
    )


def write_lines(folder: Path, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write one JSON object per line. Raises a NumericsError if a number is not finite."""
    try:
        text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    except ValueError as err:
        raise NumericsError(f"{name}: the model's output is not finite; nothing was written") from err
    atomic_text(folder / name, text)


def write_shipped(run: Path, prepared: Prepared, scores: Scores) -> Path:
    """Write run/adapter (with full fine-tuning: run/model) atomically, replacing the one before."""
    recipe, base = prepared.recipe, prepared.base
    side = Side(
        task=recipe.task,
        labels=prepared.labels,
        tuned=dict(prepared.tuned),
        max_length=recipe.data.max_length or base.max_length,
        base=Base.of(base.name, base.revision, base.fingerprint),
        dtype=DTYPE_NAMES[prepared.dtype],
        quantize=recipe.model.quantize,
        pooling=base.pooling,
        method=recipe.train.method,
        columns=columns_of(recipe.data),
        data=prepared.fingerprints,
        scores={key: value for key, value in scores.items() if isinstance(value, float)},
        versions=versions(),
        begins_from=prepared.origin.facts() if prepared.origin else {},
    )
    target = run / (MODEL if prepared.config is None else ADAPTER)
    with atomic_folder(target, replace=True) as folder:
        if prepared.config is None:
            save_model(base.model, base.tokenizer, folder, layout_of(recipe.task, side.max_length))
        else:
            info = BaseInfo(base.name, base.revision, base.kind.peft_task_type)
            save_adapter(base.model, folder, prepared.config, info, prepared.adapter)
            base.tokenizer.save_pretrained(folder)
        write_side(folder, side)
    return target
