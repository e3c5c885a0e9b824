"""One run: train, score, keep the best, and leave a run folder behind."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.engine.adapter import write_shipped
from lorakit.engine.checkpoint import (
    Checkpoint,
    load_checkpoint,
    newest_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from lorakit.engine.evaluate import answer_all
from lorakit.engine.events import Evaluated, Note, Report, Started, ignore
from lorakit.engine.prepare import Part, Prepared, trained_parameters
from lorakit.engine.ranks import ALONE
from lorakit.engine.resamples import sampled, write_resamples
from lorakit.engine.runtime import seed_rank
from lorakit.engine.train import Step, make_optimizer, train
from lorakit.errors import ConfigError, NumericsError, OutputError
from lorakit.lora import RankBudget
from lorakit.tasks.base import Scores, goodness
from lorakit.tasks.intervals import intervals, resample, with_intervals

SAMPLES = 20  # validation examples shown in samples.jsonl
LOG_LINES = 400  # about so many loss lines in metrics.jsonl, whatever the run's length


@dataclass
class History:
    """What a run has learned about itself so far; part of every checkpoint."""

    best: float = float("-inf")  # of `goodness`
    best_step: int = 0
    since_best: int = 0  # evaluations
    seconds: float = 0.0  # of training alone, evaluations left out
    examples: int = 0
    lines: list[dict[str, Any]] = field(default_factory=list)  # of metrics.jsonl


@dataclass(frozen=True)
class Result:
    """Where the run is, and its scores (those of scores.json)."""

    folder: Path
    scores: Scores


class Run:
    """A prepared run and its folder, from the first step or from a checkpoint to the end."""

    def __init__(self, prepared: Prepared, folder: Path, report: Report = ignore) -> None:
        self.prepared = prepared
        self.ranks = prepared.ranks
        self.folder = folder
        self.report = report
        self.history = History()
        lora, saved = trained_parameters(prepared.model)
        self.optimizer = make_optimizer(lora, saved, prepared.recipe.train)
        if prepared.config is not None and prepared.config.update == "adalora":
            target_r = prepared.recipe.lora.target_r or max(1, prepared.config.r // 2)
            RankBudget(prepared.model, target_r, prepared.plan.steps).attach(self.optimizer)
        self.best_state: dict[str, Tensor] = {}
        self.interval = _Interval(max(1, prepared.plan.steps // LOG_LINES))
        self.start = 0

    def fit(self) -> Result:
        """Train to the end (or until patience is out), then write scores, samples and predictions of the best."""
        prepared = self.prepared
        self.ranks.first((self.folder / "recipe.toml").write_text, prepared.recipe.to_toml(), encoding="utf-8")
        if self.start == 0:
            seed_rank(prepared.recipe.train.seed, self.ranks.rank)  # dropout; a resumed run has its state restored
        self.report(Started(prepared.plan.steps, self.start, prepared.task.metric))
        if not self._out_of_patience():  # a run that patience had ended is not trained on when it is resumed
            self._train()
        return self._finish()

    def _train(self) -> None:
        prepared, history = self.prepared, self.history
        items = prepared.parts["train"].flat
        clock = time.perf_counter()
        steps = train(prepared.model, prepared.task, items, self.optimizer, prepared.plan, self.start, ranks=self.ranks)
        for step in steps:
            seconds = time.perf_counter() - clock
            history.seconds += seconds
            history.examples += step.examples
            self.report(step)
            history.lines += self.interval.add(step, seconds)
            self._after(step)
            if self._out_of_patience():
                self.report(Note(f"stopped at step {step.number}: {history.since_best} evaluations without a new best"))
                break
            clock = time.perf_counter()

    def _after(self, step: Step) -> None:
        """Evaluate and save where they are due."""
        config, plan = self.prepared.recipe.train, self.prepared.plan
        every = config.eval_every or plan.steps_per_epoch
        evaluate = step.number % every == 0 or step.number == plan.steps
        save = evaluate if config.checkpoint_every is None else step.number % config.checkpoint_every == 0
        if evaluate or save:
            self._check_finite(step.number)
        if evaluate:
            self._evaluate(step)
        if save:
            self._save(step.number)

    def _check_finite(self, step: int) -> None:
        """An update of finite gradients can still overflow; such weights are neither scored nor written."""
        for name, parameter in self._parameters().items():
            if not parameter.isfinite().all():
                lr = self.prepared.recipe.train.lr
                with self.ranks.together():
                    raise NumericsError(
                        f"step {step}: {name} is not finite after the update; lower train.lr (now {lr})"
                    )

    def _evaluate(self, step: Step) -> None:
        scores = self._scores(self.prepared.parts["validation"])
        value = goodness(scores, self.prepared.task.metric)
        is_best = value > self.history.best  # a tie keeps the earlier step
        if is_best:
            self.history.best, self.history.best_step, self.history.since_best = value, step.number, 0
            self.best_state = {name: p.detach().clone() for name, p in self._parameters().items()}
            self.ranks.first(write_shipped, self.folder, self.prepared, scores)
        else:
            self.history.since_best += 1
        plain = {key: number for key, number in scores.items() if isinstance(number, float)}
        self.history.lines.append({"step": step.number, "epoch": step.epoch, "validation": plain, "is_best": is_best})
        self.ranks.first(self._write_lines, "metrics.jsonl", self.history.lines)
        self.report(Evaluated(step.number, scores, is_best))

    def _scores(self, part: Part) -> Scores:
        return self.prepared.task.score(part.examples, self._answers(part))

    def _answers(self, part: Part) -> list[Any]:
        prepared = self.prepared
        ranks = ALONE if prepared.recipe.train.shard_base else self.ranks  # sharded: every rank answers all, in step
        return answer_all(prepared.model, prepared.task, part.examples, part.items, prepared.device, ranks=ranks)

    def _out_of_patience(self) -> bool:
        patience = self.prepared.recipe.train.patience
        return patience is not None and self.history.since_best >= patience

    def _parameters(self) -> dict[str, Tensor]:
        return {n: p for g in self.optimizer.param_groups for n, p in zip(g["names"], g["params"], strict=True)}

    # Checkpoints

    def _save(self, step: int) -> None:
        best = {f"best/{name}": value for name, value in self.best_state.items()}
        starts = {f"start/{name}": value for name, value in self._starts().items()}
        tensors = {**optimizer_tensors(self.optimizer), **starts, **best, **self._random_states()}
        self.ranks.first(save_checkpoint, self.folder / "checkpoints", Checkpoint(step, tensors, self._state()))

    def _random_states(self) -> dict[str, Tensor]:
        """What dropout is drawn from, of each rank."""
        return {_rng(rank): state for rank, state in enumerate(self.ranks.gather(torch.get_rng_state()))}

    def _starts(self) -> dict[str, Tensor]:
        """What the adapter subtracts or keeps frozen; another machine's SVD may give another sign."""
        ends = (".start_A", ".start_B", ".lora_A")
        return {name: value for name, value in self.prepared.model.named_buffers() if name.endswith(ends)}

    def _state(self) -> dict[str, Any]:
        history = {**vars(self.history)}
        if not self.best_state:
            history["best"] = None  # JSON has no -inf
        return {
            "history": history,
            "interval": vars(self.interval),
            "recipe": self.prepared.recipe.to_toml(),
            "data": self.prepared.fingerprints,
            "base_sha256": self.prepared.base.sha256,
        }

    def resume(self, where: str) -> None:
        """Go on from a checkpoint: `auto` takes the newest whole one of this run folder, else a path.

        Raises:
            OutputError: there is no whole checkpoint.
            ConfigError: the checkpoint belongs to another recipe, other data or another base model.
        """
        checkpoint, notes = self.ranks.first(self._load, where)
        for note in notes:
            self.report(Note(note))
        with self.ranks.together():
            _check_same(checkpoint.state, self._state())
        restore_optimizer(self.optimizer, checkpoint.tensors)
        for name, value in self._starts().items():
            value.copy_(checkpoint.tensors[f"start/{name}"])
        self.best_state = {
            name.removeprefix("best/"): value.to(self.prepared.device)
            for name, value in checkpoint.tensors.items()
            if name.startswith("best/")
        }
        history = checkpoint.state["history"]
        self.history = History(**{**history, "best": float("-inf") if history["best"] is None else history["best"]})
        self.interval = _Interval(**checkpoint.state["interval"])
        self._restore_random_state(checkpoint)
        self.start = checkpoint.step
        self.report(Note(f"resumed after step {checkpoint.step}"))

    def _load(self, where: str) -> tuple[Checkpoint, list[str]]:
        return newest_checkpoint(self.folder / "checkpoints") if where == "auto" else (load_checkpoint(Path(where)), [])

    def _restore_random_state(self, checkpoint: Checkpoint) -> None:
        """With another number of ranks than before, dropout draws anew; the order of the examples is the same."""
        before = sum(key.startswith("rng") for key in checkpoint.tensors)
        if before == self.ranks.size:
            torch.set_rng_state(checkpoint.tensors[_rng(self.ranks.rank)])
        else:
            seed_rank(self.prepared.recipe.train.seed + checkpoint.step, self.ranks.rank)
            self.report(
                Note(
                    f"{before} processes before, {self.ranks.size} now: the examples of each step are the same, "
                    "dropout is not"
                )
            )

    # The end

    @torch.no_grad()
    def _finish(self) -> Result:
        last: Mapping[str, float] = next(
            (line["validation"] for line in reversed(self.history.lines) if "validation" in line), {}
        )
        for name, parameter in self._parameters().items():
            parameter.copy_(self.best_state[name])
        parts = self.prepared.parts
        test = self._answers(parts["test"]) if "test" in parts else []
        return self.ranks.first(self._write_results, self._answers(parts["validation"]), test, last)

    def _write_results(self, answers: list[Any], test_answers: list[Any], last: Mapping[str, float]) -> Result:
        part = self.prepared.parts["validation"]
        if tuned := self.prepared.task.tune(part.examples, answers):
            self.prepared = replace(self.prepared, task=self.prepared.task.with_tuned(tuned))
        prepared = self.prepared
        resampled = resample(prepared.task.statistics(part.examples, answers))
        scores = prepared.task.score(part.examples, answers)
        if tuned:
            write_shipped(self.folder, prepared, scores)
        write_resamples(self.folder, sampled(part.examples, prepared.task.metric, resampled))
        scores["intervals"] = intervals(resampled, len(part.examples))
        if "test" in prepared.parts:
            scores["test"] = with_intervals(prepared.task, prepared.parts["test"].examples, test_answers)
        scores.update(self._about(last))
        lines = [prepared.task.to_json(e, a) for e, a in zip(part.examples, answers, strict=True)]
        expected = [{"expected": prepared.task.expected(example)} for example in part.examples]
        both = [{**line, **gold} for line, gold in zip(lines, expected, strict=True)]
        self._write_lines("predictions.jsonl", both)
        self._write_lines("samples.jsonl", both[:SAMPLES])
        self._write_lines("metrics.jsonl", self.history.lines)
        text = json.dumps(scores, indent=2, ensure_ascii=False)
        (self.folder / "scores.json").write_text(text + "\n", encoding="utf-8")
        return Result(self.folder, scores)

    def _about(self, last: Mapping[str, float]) -> dict[str, Any]:
        """What the scores are scores of, and what they cost."""
        prepared, history = self.prepared, self.history
        sizes = {name: len(part.examples) for name, part in prepared.parts.items()}
        counts = prepared.parameters
        return {
            "metric": prepared.task.metric,
            "best_step": history.best_step,
            "evaluations": sum("validation" in line for line in history.lines),
            "last": dict(last),
            "examples": sizes,
            "method": prepared.recipe.train.method,
            "parameters": {
                "trainable": counts.trainable,
                "lora": counts.lora,
                "saved": counts.saved,
                "total": counts.total,
            },
            "train_seconds": round(history.seconds, 3),
            "examples_per_s": round(history.examples / history.seconds, 1) if history.seconds else 0.0,
            "dtype": str(prepared.dtype).removeprefix("torch."),
            "seed": prepared.recipe.train.seed,
        }

    def _write_lines(self, name: str, lines: list[dict[str, Any]]) -> None:
        try:
            text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
        except ValueError as err:
            raise NumericsError(f"{name}: an answer of the model is not finite; nothing of it was written") from err
        (self.folder / name).write_text(text, encoding="utf-8")


def _rng(rank: int) -> str:
    return f"rng/{rank}" if rank else "rng"


@dataclass
class _Interval:
    """Means of the loss over intervals of steps, so that metrics.jsonl stays short; part of every checkpoint."""

    every: int  # steps
    losses: list[float] = field(default_factory=list)
    examples: int = 0
    seconds: float = 0.0

    def add(self, step: Step, seconds: float) -> list[dict[str, Any]]:
        self.losses.append(step.loss)
        self.examples += step.examples
        self.seconds += seconds
        if step.number % self.every:
            return []
        line = {
            "step": step.number,
            "epoch": step.epoch,
            "loss": sum(self.losses) / len(self.losses),
            "lr": step.lr,
            "grad_norm": step.grad_norm,
            "examples_per_s": self.examples / self.seconds if self.seconds else 0.0,
        }
        self.losses, self.examples, self.seconds = [], 0, 0.0
        return [line]


def _check_same(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for key, words, detail in (
        ("data", "the data", _changed_sources),
        ("base_sha256", "the base model", _changed_sha256),
        ("recipe", "the recipe", _first_difference),
    ):
        if saved[key] != now[key]:
            raise ConfigError(
                f"--resume: {words} changed since the checkpoint was written: {detail(saved[key], now[key])}; "
                "start a new run instead"
            )


def _first_difference(saved: str, now: str) -> str:
    was, is_now = set(saved.splitlines()), set(now.splitlines())
    gone, new = sorted(was - is_now), sorted(is_now - was)
    return f"it had {gone[0] if gone else 'nothing'!r}, now {new[0] if new else 'nothing'!r}"


def _changed_sources(saved: Mapping[str, str], now: Mapping[str, str]) -> str:
    changed = [name for name in {**saved, **now} if saved.get(name) != now.get(name)]
    return f"the sha256 of {', '.join(changed)} differs"


def _changed_sha256(saved: str, now: str) -> str:
    return f"sha256 {saved[:12]}... then, {now[:12]}... now"


def open_run_folder(folder: Path, resume: str | None) -> None:
    """Make the run folder, after `check_run_folder`."""
    check_run_folder(folder, resume)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise OutputError(f"output.dir = {str(folder)!r} cannot be made: {err.strerror}") from err


def check_run_folder(folder: Path, resume: str | None) -> None:
    """Refuse a folder that holds anything, unless the run in it is to be resumed; nothing is written."""
    if resume is None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"output.dir = {str(folder)!r} exists already; choose another one, or use --resume auto")
    if resume == "auto" and not (folder / "checkpoints").is_dir():
        raise OutputError(f"output.dir = {str(folder)!r} has no checkpoints to resume from")
    if resume not in (None, "auto") and not Path(resume).is_dir():
        raise OutputError(f"--resume {resume}: no such checkpoint; say auto, or the folder of one")
