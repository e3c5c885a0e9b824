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
from lorakit.engine.atomic import atomic_text
from lorakit.engine.checkpoint import Checkpoint, optimizer_tensors, restore_optimizer, save_checkpoint
from lorakit.engine.evaluate import answer_all
from lorakit.engine.events import Evaluated, Note, Report, Started, ignore
from lorakit.engine.prefix import keep_prefix
from lorakit.engine.prepare import Part, Prepared, trained_parameters
from lorakit.engine.resamples import sampled, write_resamples
from lorakit.engine.resume import check_identity, identity
from lorakit.engine.run_folder import CHECKPOINTS, RECIPE
from lorakit.engine.runtime import random_state, seed_rank, set_random_state
from lorakit.engine.signals import ELSEWHERE, Stop
from lorakit.engine.train import Step, make_optimizer, train
from lorakit.engine.watch import LossWatch
from lorakit.errors import NumericsError
from lorakit.lora import RankBudget
from lorakit.tasks.base import Scores, goodness
from lorakit.tasks.intervals import intervals, resample, with_intervals

SAMPLES = 20  # validation examples shown in samples.jsonl
LOG_LINES = 400  # about so many loss lines in metrics.jsonl, whatever the run's length
SKIPS_IN_A_ROW, SKIPS = 5, 50  # steps that train.non_finite = "skip" leaves out at most


@dataclass
class History:
    """What a run has learned about itself so far; part of every checkpoint."""

    best: float = float("-inf")  # of `goodness`
    best_step: int = 0
    since_best: int = 0  # evaluations
    seconds: float = 0.0  # of training alone, evaluations left out
    saving_seconds: float = 0.0  # of checkpoints
    examples: int = 0
    skipped_in_a_row: int = 0  # steps whose numbers were not finite
    skipped: int = 0  # the same, in all
    micro_batch_size: int | None = None  # what memory has room for, where that is less than the recipe's
    lines: list[dict[str, Any]] = field(default_factory=list)  # of metrics.jsonl


@dataclass(frozen=True)
class Result:
    """Where the run is, and its scores (those of scores.json)."""

    folder: Path
    scores: Scores


class Run:
    """A prepared run and its folder, from the first step or from a checkpoint to the end."""

    def __init__(self, prepared: Prepared, folder: Path, report: Report = ignore, stop: Stop | None = None) -> None:
        self.prepared = prepared
        self.ranks = prepared.ranks
        self.folder = folder
        self.report = report
        self.stop = stop or Stop()
        self.history = History()
        lora, saved = trained_parameters(prepared.model)
        self.optimizer = make_optimizer(lora, saved, prepared.recipe.train)
        if prepared.config is not None and prepared.config.update == "adalora":
            target_r = prepared.recipe.lora.target_r or max(1, prepared.config.r // 2)
            RankBudget(prepared.model, target_r, prepared.plan.steps).attach(self.optimizer)
        self.best_state: dict[str, Tensor] = {}
        self.interval = _Interval(max(1, prepared.plan.steps // LOG_LINES))
        self.watch = LossWatch()
        self.start = self.saved = 0  # steps done when the run began, and in the newest checkpoint

    def fit(self) -> Result:
        """Train to the end (or until patience is out), then write scores, samples and predictions of the best.

        Where `stop` was asked for, it saves after the step in hand.

        Raises:
            KeyboardInterrupt: it was asked for.
        """
        self.ranks.first(self._write_start)
        if self.start == 0:
            seed_rank(self.prepared.recipe.train.seed, self.ranks.rank)  # dropout; a resumed run has its state restored
        self.report(Started(self.prepared.plan.steps, self.start, self.prepared.task.metric))
        clock = time.perf_counter()
        keep_prefix(self.prepared, self.report)
        self.history.seconds += time.perf_counter() - clock
        with self.stop.gently():
            if self.start:
                self._after(self.start)  # an evaluation that a signal cut short
            if not self._out_of_patience():  # a run that patience had ended is not trained on when it is resumed
                self._train()
        return self._finish()

    def _write_start(self) -> None:
        atomic_text(self.folder / RECIPE, self.prepared.recipe.to_toml())
        if self.start:
            self._write_lines("metrics.jsonl", self.history.lines)  # a killed run may have written later ones

    def _train(self) -> None:
        prepared, history = self.prepared, self.history
        clock = time.perf_counter()
        for step in train(
            prepared.model,
            prepared.task,
            prepared.parts["train"].flat,
            self.optimizer,
            prepared.plan,
            self.start,
            ranks=self.ranks,
            micro_batch_size=history.micro_batch_size,
        ):
            seconds = time.perf_counter() - clock
            history.seconds += seconds
            history.examples += step.examples
            self._look_at(step)
            if not step.skipped:
                self.report(step)
                history.lines += self.interval.add(step, seconds)
            self._after(step.number)
            if self._out_of_patience():
                self.report(Note(f"stopped at step {step.number}: {history.since_best} evaluations without a new best"))
                break
            clock = time.perf_counter()

    def _look_at(self, step: Step) -> None:
        """Tell of what is odd about a step, and end the run where too many are skipped."""
        history = self.history
        if step.micro_batch_size < (history.micro_batch_size or self.prepared.plan.micro_batch_size):
            history.micro_batch_size = step.micro_batch_size
            size = self.prepared.recipe.train.batch_size
            self.report(
                Note(
                    f"out of memory at step {step.number}: {step.micro_batch_size} examples a forward from now on; "
                    f"a step still has {size}, and its gradient is the same"
                )
            )
        history.skipped_in_a_row = history.skipped_in_a_row + 1 if step.skipped else 0
        if not step.skipped:
            if warning := self.watch.add(step.number, step.loss, step.lr):
                self.report(Note(warning))
            return
        history.skipped += 1
        told = f"step {step.number}: the loss is {step.loss}, the gradient's norm {step.grad_norm}; skipped"
        if history.skipped_in_a_row > SKIPS_IN_A_ROW or history.skipped > SKIPS:
            with self.ranks.together():
                raise NumericsError(
                    f"{told}, as {history.skipped - 1} before it: at most {SKIPS_IN_A_ROW} in a row and {SKIPS} in all "
                    f"may be; a lower train.lr (now {self.prepared.recipe.train.lr}) is the usual remedy"
                )
        self.report(Note(f"{told} ({history.skipped} of at most {SKIPS})"))

    def _after(self, number: int) -> None:
        """Evaluate and save where they are due after step `number`, and stop where that was asked for."""
        config, plan = self.prepared.recipe.train, self.prepared.plan
        every = config.eval_every or plan.steps_per_epoch
        evaluate = number % every == 0 or number == plan.steps
        save = evaluate if config.checkpoint_every is None else number % config.checkpoint_every == 0
        try:
            if evaluate and not any("validation" in line and line["step"] == number for line in self.history.lines):
                self._evaluate(number)
                self.saved = 0  # a checkpoint of this step from before knows nothing of it
            if self.ranks.any(bool(self.stop.asked)):
                self.stop.asked = self.stop.asked or ELSEWHERE
                self.stop.check()
        except KeyboardInterrupt:
            if self.stop.asked:
                self._save(number)
                self.report(Note(f"stopped after step {number} of {plan.steps}, and saved"))
            raise
        if (save or number == plan.steps or self._out_of_patience()) and number != self.saved:
            self._save(number)

    def _check_finite(self, step: int) -> None:
        """An update of finite gradients can still overflow; such weights are neither scored nor written."""
        for name, parameter in self._parameters().items():
            if not parameter.isfinite().all():
                lr = self.prepared.recipe.train.lr
                with self.ranks.together():
                    raise NumericsError(
                        f"step {step}: {name} is not finite after the update; lower train.lr (now {lr})"
                    )

    def _evaluate(self, number: int) -> None:
        self._check_finite(number)
        scores = self._scores(self.prepared.parts["validation"])  # nothing is lost where a signal breaks it off
        value = goodness(scores, self.prepared.task.metric)
        is_best = value > self.history.best  # a tie keeps the earlier step
        if is_best:
            self.history.best, self.history.best_step, self.history.since_best = value, number, 0
            self.best_state = {name: p.detach().clone() for name, p in self._parameters().items()}
            self.ranks.first(write_shipped, self.folder, self.prepared, scores)
        else:
            self.history.since_best += 1
        plain = {key: number for key, number in scores.items() if isinstance(number, float)}
        epoch = number / self.prepared.plan.steps_per_epoch
        self.history.lines.append({"step": number, "epoch": epoch, "validation": plain, "is_best": is_best})
        self.ranks.first(self._write_lines, "metrics.jsonl", self.history.lines)
        self.report(Evaluated(number, scores, is_best))

    def _scores(self, part: Part) -> Scores:
        return self.prepared.task.score(part.examples, self._answers(part))

    def _answers(self, part: Part) -> list[Any]:
        prepared = self.prepared
        arguments = (prepared.model, prepared.task, part.examples, part.items, prepared.device)
        if prepared.recipe.train.shard_base and self.ranks.size > 1:
            return answer_all(*arguments)  # every rank answers all, in step and to the end
        return answer_all(*arguments, ranks=self.ranks, stop=self.stop)

    def _out_of_patience(self) -> bool:
        patience = self.prepared.recipe.train.patience
        return patience is not None and self.history.since_best >= patience

    def _parameters(self) -> dict[str, Tensor]:
        return {n: p for g in self.optimizer.param_groups for n, p in zip(g["names"], g["params"], strict=True)}

    # Checkpoints

    def _save(self, number: int) -> None:
        clock = time.perf_counter()
        self._check_finite(number)
        best = {f"best/{name}": value for name, value in self.best_state.items()}
        starts = {f"start/{name}": value for name, value in self._starts().items()}
        tensors = {**optimizer_tensors(self.optimizer), **starts, **best, **self._random_states()}
        checkpoint = Checkpoint(number, tensors, self._state())
        self.ranks.first(save_checkpoint, self.folder / CHECKPOINTS, checkpoint)
        self.saved = number
        self.history.saving_seconds += time.perf_counter() - clock

    def _random_states(self) -> dict[str, Tensor]:
        """What dropout is drawn from: one generator a rank and kind of device."""
        every = self.ranks.gather(random_state(self.prepared.device))
        return {f"rng/{rank}/{kind}": state for rank, states in enumerate(every) for kind, state in states.items()}

    def _starts(self) -> dict[str, Tensor]:
        """What the adapter subtracts or keeps frozen; another machine's SVD may give another sign."""
        ends = (".start_A", ".start_B", ".lora_A")
        return {name: value for name, value in self.prepared.model.named_buffers() if name.endswith(ends)}

    def _state(self) -> dict[str, Any]:
        history = {**vars(self.history)}
        if not self.best_state:
            history["best"] = None  # JSON has no -inf
        return {"history": history, "interval": vars(self.interval), **identity(self.prepared)}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint, as if the run had never stopped.

        Raises:
            ConfigError: the checkpoint belongs to another recipe, other data or another base model.
        """
        with self.ranks.together():
            check_identity(checkpoint, self.prepared, self.report)
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
        self.start = self.saved = checkpoint.step
        self.report(Note(f"resumed after step {checkpoint.step}"))

    def _restore_random_state(self, checkpoint: Checkpoint) -> None:
        """With another number of ranks than before, dropout draws anew; the order of the examples is the same."""
        states: dict[int, dict[str, Tensor]] = {}
        for key, state in checkpoint.tensors.items():
            if key.startswith("rng/"):
                _, rank, kind = key.split("/")
                states.setdefault(int(rank), {})[kind] = state
        if len(states) == self.ranks.size:
            set_random_state(states[self.ranks.rank], self.prepared.device)
        else:
            seed_rank(self.prepared.recipe.train.seed + checkpoint.step, self.ranks.rank)
            self.report(
                Note(
                    f"{len(states)} processes before, {self.ranks.size} now: the examples of each step are the same, "
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
        atomic_text(self.folder / "scores.json", json.dumps(scores, indent=2, ensure_ascii=False) + "\n")
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
            "saving_seconds": round(history.saving_seconds, 3),
            "examples_per_s": round(history.examples / history.seconds, 1) if history.seconds else 0.0,
            "dtype": str(prepared.dtype).removeprefix("torch."),
            "seed": prepared.recipe.train.seed,
        }

    def _write_lines(self, name: str, lines: list[dict[str, Any]]) -> None:
        try:
            text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
        except ValueError as err:
            raise NumericsError(f"{name}: an answer of the model is not finite; nothing of it was written") from err
        atomic_text(self.folder / name, text)


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
