"""One or several runs over one model: when to evaluate and save, which step is the best, and when a run is over.

The files of a run are written in checkpoint.py and results.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from lorakit.errors import LorakitError, NumericsError, RankError
from lorakit.inference.answer import Judged, answer_all, mean_loss, with_loss
from lorakit.lora import RankBudget, routed
from lorakit.runtime.device import random_state, seed_rank
from lorakit.runtime.events import Evaluated, Logged, Note, Report, Started, Step, ignore
from lorakit.runtime.files import atomic_text
from lorakit.runtime.signals import ELSEWHERE, Stop
from lorakit.tasks.base import Task
from lorakit.tasks.metrics.bootstrap import goodness
from lorakit.training.checkpoint import Checkpoint, Progress, checkpoint_of, restore, save_checkpoint
from lorakit.training.head_start import warm_up
from lorakit.training.joint import keep_prefix
from lorakit.training.loop import LOSS_SCALE, Member, train
from lorakit.training.parts import Part
from lorakit.training.prepare import Prepared
from lorakit.training.progress import History, Interval, LossWatch
from lorakit.training.results import Result, write_lines, write_results, write_shipped
from lorakit.training.run_files import CHECKPOINTS, RECIPE
from lorakit.training.schedule import make_optimizer, trained_parameters

LOG_LINES = 400  # about how many loss lines metrics.jsonl has, whatever the run's length
SKIPS_IN_A_ROW, SKIPS = 5, 50  # the most steps that train.non_finite = "skip" skips


class Run:
    """A prepared run and its folder, from the first step or a checkpoint to the end."""

    def __init__(
        self,
        prepared: Prepared,
        folder: Path,
        report: Report = ignore,
        stop: Stop | None = None,
        pause_after: float | None = None,
    ) -> None:
        """`pause_after`, a share of the steps, pauses the run at the first evaluation after it."""
        self.prepared = prepared
        self.ranks = prepared.ranks
        self.folder = folder
        self.report = report
        self.stop = stop or Stop()
        self.history = History()
        assert bool(prepared.folds) == bool(prepared.fold_of), (
            "prepare_all adds the folds; without them training examples score"
        )
        self.members = [member_of(each) for each in (prepared, *prepared.folds)]
        self.member = self.members[0]  # the others are those of its folds
        self.interval = Interval(max(1, prepared.plan.steps // LOG_LINES))
        self.watch = LossWatch()
        self.start = 0  # steps done when the run began
        self.saved: int | None = None  # and in the newest checkpoint
        self.best_answers: list[Any] | None = None  # to the validation examples, by the best step; None after a resume
        self.pause_after = None if pause_after is None else max(1, round(pause_after * prepared.plan.steps))
        self.is_paused = False

    def fit(self) -> Result:
        """Train to the end (or until patience runs out), then write scores, samples and predictions of the best step.

        After a signal to stop, the run is saved after the current step.

        Raises:
            KeyboardInterrupt: a signal stopped it.
        """
        (result,) = fit_all([self])
        assert isinstance(result, Result), "a single run raises its error"
        return result

    def begin(self) -> None:
        """Write the first files of the run folder, and report the start."""
        self.ranks.first(atomic_text, self.folder / RECIPE, self.prepared.recipe.to_toml())
        if self.start:  # a killed run may have written later lines
            self.ranks.first(write_lines, self.folder, "metrics.jsonl", self.history.lines)
        self.report(Started(self.prepared.plan.steps, self.start, self.prepared.recipe.task.selection_metric))

    def on_step(self, step: Step, seconds: float) -> None:
        """Record a step and its cost, report warnings about it, and raise if too many steps were skipped."""
        history, config = self.history, self.prepared.recipe.train
        history.seconds += seconds
        history.examples += step.examples
        if step.micro_batch_size < (history.micro_batch_size or self.prepared.plan.micro_batch_size):
            history.micro_batch_size = step.micro_batch_size
            self.report(
                Note(
                    f"out of memory at step {step.number}: {step.micro_batch_size} examples in a forward pass from "
                    f"now on; a step still has {config.batch_size}, with the same gradient"
                )
            )
        if not step.skipped:
            history.skipped_in_a_row = 0
            if warning := self.watch.add(step.number, step.loss, step.lr):
                self.report(Note(warning))
            if line := self.interval.add(step, seconds):
                self._log(line)
            self.report(step)
            return
        history.skipped_in_a_row += 1
        history.skipped += 1
        what = f"step {step.number}: the loss is {step.loss}, the gradient's norm {step.grad_norm}"
        remedy = f"lowering train.lr (now {config.lr}) usually helps"
        if config.non_finite == "stop":
            with self.ranks.together():  # the sums are the same on all ranks
                raise NumericsError(f"{what}; training stopped; {remedy}")
        if history.skipped_in_a_row > SKIPS_IN_A_ROW or history.skipped > SKIPS:
            with self.ranks.together():
                raise NumericsError(
                    f"{what}; {history.skipped} steps were skipped so far, and the limit is {SKIPS_IN_A_ROW} in a row "
                    f"and {SKIPS} in all; {remedy}"
                )
        self.report(Note(f"{what}; skipped ({history.skipped} of at most {SKIPS})"))

    def _log(self, line: dict[str, Any]) -> None:
        self.history.lines.append(line)
        self.report(Logged(line))

    def evaluate_and_save_if_due(self) -> bool:
        """Evaluate and save if due. Returns whether the run is over: at its end, out of patience or paused."""
        config, plan, number = self.prepared.recipe.train, self.prepared.plan, self.member.done
        every = config.eval_every or plan.steps_per_epoch
        is_last = number == plan.steps
        evaluate = number % every == 0 or is_last
        save = evaluate if config.checkpoint_every is None else number % config.checkpoint_every == 0
        if evaluate and self.history.last_scores.get("step") != number:
            self._evaluate(number)
            self.saved = None  # an earlier checkpoint of this step lacks these scores
        since = self.history.since_best
        is_out_of_patience = config.patience is not None and since >= config.patience
        if is_out_of_patience:
            self.report(Note(f"stopped at step {number}: {since} evaluations without a new best"))
        elif self.pause_after is not None and not is_last:
            self.is_paused = self.pause_after <= self.history.last_scores.get("step", 0)
        is_over = is_last or is_out_of_patience or self.is_paused
        if (save and number) or is_over:
            self.save()
        return is_over

    def _evaluate(self, number: int) -> None:
        """Score the validation examples, and store the parameters if they are the best so far."""
        self._check_finite(number)
        history, prepared, part = self.history, self.prepared, self.prepared.parts["validation"]
        # a signal may interrupt this: nothing is lost
        judged: list[Judged] = self._validation_answers(with_loss)
        scores = prepared.task.evaluate(part.examples, [each.answer for each in judged]).scores
        value = goodness(scores, prepared.recipe.task.selection_metric)
        # a tie keeps the earlier step; while the metric is undefined, or with few examples, the last step counts
        is_best = value > history.best or history.best == float("-inf") or prepared.keeps_last
        if is_best:
            history.best, history.best_step, history.since_best = value, number, 0
            self.best_answers = [each.answer for each in judged]
            for member in self.members:
                member.best = {name: p.detach().clone() for name, p in member.named_parameters.items()}
            self.ranks.first(write_shipped, self.folder, prepared, scores)
        else:
            history.since_best += 1
        plain = {key: number for key, number in scores.items() if isinstance(number, float)}
        if (loss := mean_loss(judged)) is not None:
            plain["loss"] = loss
        epoch = number / prepared.plan.steps_per_epoch
        self._log({"step": number, "epoch": epoch, "validation": plain, "is_best": is_best})
        self.ranks.first(write_lines, self.folder, "metrics.jsonl", history.lines)
        self.report(Evaluated(number, scores, is_best and not prepared.keeps_last))

    def _validation_answers(self, changed: Callable[[Task], Task] = lambda task: task) -> list[Any]:
        """The answers to the validation examples, of the changed task; in cross-validation of the fold that has
        not seen them."""
        every = [
            iter(self._answers(each, each.parts["validation"], changed(each.task)))
            for each in self.prepared.folds or [self.prepared]
        ]
        return [next(every[fold]) for fold in self.prepared.fold_of] if self.prepared.folds else list(*every)

    def _answers(self, prepared: Prepared, part: Part, task: Task) -> list[Any]:
        arguments = (prepared.model, task, part.examples, part.items, prepared.device)
        with routed(prepared.model, [(prepared.adapter, 0)]):
            if prepared.recipe.train.shard_base and self.ranks.size > 1:
                return answer_all(*arguments)  # every rank predicts all examples, in lockstep
            return answer_all(*arguments, ranks=self.ranks, stop=self.stop)

    def _check_finite(self, step: int) -> None:
        """Raise if a parameter overflowed in the update; such weights are neither scored nor saved."""
        named = chain.from_iterable(member.named_parameters.items() for member in self.members)
        for name, parameter in named:
            if not parameter.isfinite().all():
                lr = self.prepared.recipe.train.lr
                with self.ranks.together():
                    raise NumericsError(
                        f"step {step}: {name} is not finite after the update; lower train.lr (now {lr})"
                    )

    def save(self) -> None:
        """Write a checkpoint of the last step, unless there is one."""
        number = self.member.done
        if self.saved == number:
            return
        clock = time.perf_counter()
        self._check_finite(number)
        checkpoint = checkpoint_of(self.prepared, self.members, Progress(self.history, self.interval))
        self.ranks.first(save_checkpoint, self.folder / CHECKPOINTS, checkpoint)
        self.saved = number
        self.history.saving_seconds += time.perf_counter() - clock

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint, as if the run had never stopped.

        Raises:
            ConfigError: the checkpoint belongs to another recipe, other data or another base model.
        """
        self.history, self.interval = restore(checkpoint, self.prepared, self.members, self.report)
        self.start = self.saved = checkpoint.step
        for member in self.members:
            member.micro_batch_size = self.history.micro_batch_size
        self.report(Note(f"resumed after step {checkpoint.step}"))

    @torch.no_grad()
    def finish(self) -> Result:
        """Write the results of the best parameters; for a paused run, return its last scores."""
        if self.is_paused:
            scores = {**self.history.last_scores, "metric": self.prepared.recipe.task.selection_metric}
            return Result(self.folder, scores, is_paused=True)
        for member in self.members:
            for name, parameter in member.named_parameters.items():
                parameter.copy_(member.best[name])
        parts, task = self.prepared.parts, self.prepared.task
        test = self._answers(self.prepared, parts["test"], task) if "test" in parts else []
        answers = self._validation_answers() if self.best_answers is None else self.best_answers
        return self.ranks.first(write_results, self.folder, self.prepared, self.history, answers, test)


def member_of(prepared: Prepared) -> Member:
    """What the loop trains of a prepared run, at its first step."""
    lora, saved = trained_parameters(prepared.model, prepared.adapter)
    optimizer = make_optimizer(lora, saved, prepared.plan.config)
    if prepared.config is not None and prepared.config.update == "adalora":
        target_r = prepared.recipe.lora.target_r or max(1, prepared.config.r // 2)
        RankBudget(prepared.model, target_r, prepared.plan.steps, prepared.adapter).attach(optimizer)
    seed_rank(prepared.recipe.train.seed, prepared.ranks.rank)
    return Member(
        prepared.task,
        prepared.parts["train"].drawn(prepared.task.info),
        optimizer,
        prepared.plan,
        prepared.adapter,
        draws=prepared.draws,
        loss_scale=LOSS_SCALE if prepared.dtype == torch.float16 else 1.0,
        random_state=random_state(prepared.device),
    )


def fit_all(runs: Sequence[Run]) -> list[Result | LorakitError]:
    """Train runs whose adapters share one model, each to its own end. Returns a Result for each, or the error that
    ended only it.

    Raises:
        KeyboardInterrupt: a signal stopped them; every run is saved after the current step.
        LorakitError: an error that ends all runs, or any error of a single run.
    """
    first, live, results = runs[0], list(runs), dict[Run, Result | LorakitError]()
    stop, ranks = first.stop, first.ranks
    for run in runs:
        run.begin()
    clock = time.perf_counter()
    keep_prefix([run.prepared for run in runs], first.report)
    for run in runs:
        run.history.seconds += (time.perf_counter() - clock) / len(runs)
    members = [member for run in runs for member in run.members]
    with stop.deferred():
        # first, without a step, what was still due after the step of a checkpoint, or of a probe its score
        for steps in chain(
            [dict[Member, Step]()], _learn_pairs(runs), train(first.prepared.model, members, ranks=ranks)
        ):
            seconds, tokens = time.perf_counter() - clock, sum(step.tokens for step in steps.values())
            over: list[Run] = []
            try:
                for run in live:
                    with _ends_alone(run, runs, results):
                        if own := [steps[member] for member in run.members if member in steps]:
                            shown = next((step for step in own if step.skipped), own[0])
                            step = replace(shown, examples=sum(step.examples for step in own))
                            run.on_step(step, seconds * sum(step.tokens for step in own) / tokens)
                        if (run.member.done or run.prepared.scores_first) and run.evaluate_and_save_if_due():
                            over.append(run)
                if ranks.any(bool(stop.signal)):
                    stop.signal = stop.signal or ELSEWHERE
                    stop.check()
                for run in over:
                    with stop.immediate(), _ends_alone(run, runs, results):
                        results[run] = run.finish()
            except KeyboardInterrupt:
                if stop.signal:
                    for run in (run for run in live if run not in results):
                        run.save()
                        run.report(
                            Note(f"stopped after step {run.member.done} of {run.prepared.plan.steps}, and saved")
                        )
                raise
            live = [run for run in live if run not in results]
            members[:] = [member for run in live for member in run.members]  # the loop stops training the others
            clock = time.perf_counter()
    return [results[run] for run in runs]


def _learn_pairs(runs: Sequence[Run]) -> Iterator[dict[Member, Step]]:
    """Without a step, what the adapters of few examples learn from pairs before it."""
    for run in runs:
        folds = run.prepared.folds
        for fold, (prepared, member) in enumerate(zip((run.prepared, *folds), run.members, strict=True)):
            if prepared.contrasts and not member.done:
                whose = f" of fold {fold} of {len(folds)}" if fold else ""
                why = "" if fold else " (train.head_start = 'contrast')"
                run.report(Note(f"the adapter{whose} first learns from pairs of texts{why}"))
                warm_up(prepared)
    yield from ()


@contextmanager
def _ends_alone(run: Run, runs: Sequence[Run], results: dict[Run, Result | LorakitError]) -> Iterator[None]:
    """An error of non-finite numbers ends only its own run."""
    try:
        yield
    except (NumericsError, RankError) as err:  # the same on every rank
        if len(runs) == 1 or err.exit_code != NumericsError.exit_code:
            raise
        results[run] = err
