"""One run: what each method trains, which checkpoint is kept, what the run folder holds."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from collections.abc import Callable
from itertools import chain, repeat
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from lorakit.errors import DataError, NumericsError
from lorakit.lora import count_parameters
from lorakit.recipe import Recipe, read_recipe
from lorakit.runtime.events import Evaluated, Event, Note, Started, Step
from lorakit.tasks.metrics.bootstrap import Evaluation, intervals
from lorakit.tasks.sequence import SequenceClassification
from lorakit.training.prepare import prepare
from lorakit.training.results import SAMPLES
from lorakit.training.run_files import DIGITS, read_resamples
from tests.runs import SIZES, Sections, changed, fit, read_lines, save_bert, scores_of, sections, start, values, weights


@pytest.fixture(scope="module")
def raw(bert: Path, files: Path) -> Sections:
    return sections(bert, files)


# Seeds


@pytest.mark.usefixtures("base_read_anew")
def test_same_seed_gives_the_same_adapter_whatever_ran_before(raw: Sections, tmp_path: Path) -> None:
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        fit(changed(raw, f"train.seed={seed}", "train.max_steps=6"), tmp_path / name)
        torch.manual_seed(99)
    assert weights(tmp_path / "first") == weights(tmp_path / "again")
    assert weights(tmp_path / "first") != weights(tmp_path / "other")


# Methods


def trained(raw: Sections, folder: Path, *words: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every parameter before and after a run."""
    run = start(changed(raw, *words), folder)
    before = values(run.prepared)
    run.fit()
    return before, values(run.prepared)


HEAD = ("classifier.adapters", "bert.pooler.dense.adapters")
LEARNS: dict[str, Callable[[str], bool]] = {
    "lora": lambda path: "lora_" in path or path.startswith(HEAD),
    "head": lambda path: path.startswith(HEAD),
    "full": lambda path: True,
}
CONSTANT = ("key.bias", "position_embeddings.weight", "word_embeddings.weight")  # softmax ignores a key's bias


@pytest.mark.parametrize("method", LEARNS)
def test_method_trains_its_part_and_leaves_all_else_bit_identical(raw: Sections, tmp_path: Path, method: str) -> None:
    before, after = trained(raw, tmp_path, f"train.method={method}")
    moved = {path for path in before if not torch.equal(before[path], after[path])}
    should = {path for path in before if LEARNS[method](path)}
    assert moved <= should
    assert {path for path in should - moved if not path.endswith(CONSTANT)} == set()


@pytest.mark.parametrize("method", LEARNS)
def test_parameter_counts_are_those_of_the_trainable_tensors(raw: Sections, tmp_path: Path, method: str) -> None:
    prepared = prepare(changed(raw, f"train.method={method}"))
    trainable = sum(p.numel() for p in prepared.model.parameters() if p.requires_grad)
    counts = prepared.parameters
    assert counts.trainable == counts.lora + counts.saved == trainable
    assert (counts.lora > 0) == (method == "lora")
    assert (counts.total == trainable) == (method == "full")
    assert counts.total - counts.lora == prepare(changed(raw, "train.method=full")).parameters.total


def test_lora_start_equals_the_base_model_and_its_dropout_is_settable(raw: Sections) -> None:
    """Before the first step the adapted model gives the numbers that full fine-tuning starts from."""
    models = [prepare(changed(raw, "model.dropout=0.25", f"train.method={method}")) for method in ("lora", "full")]
    batch = models[0].task.collate(models[0].parts["train"].flat[:4])
    with torch.no_grad():
        first, second = (p.task.predict(p.model.eval(), batch) for p in models)
    assert first == [pytest.approx(row, rel=1e-6) for row in second]  # the blocks skip padding, and as modules
    rates = {m.p for m in models[0].model.modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {0.25, raw["lora"]["dropout"]}


def test_usual_columns_of_pairs_are_read_as_pairs_and_said(raw: Sections, tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("question,answer,label\n" + "".join(f"what {i},that {i},{'ab'[i % 2]}\n" for i in range(10)))
    notes: list[str] = []
    prepared = prepare(
        changed(raw, f"data.train={path}", f"data.validation={path}"),
        lambda event: notes.append(event.text) if isinstance(event, Note) else None,
    )
    assert prepared.recipe.data.pair == "answer"
    assert {example.pair for example in prepared.parts["train"].examples} <= {f"that {i}" for i in range(10)}
    assert f"{path}: pair is column 'answer'; to read a single text, set data.text" in notes
    alone = prepare(changed(raw, f"data.train={path}", f"data.validation={path}", "data.text=question"))
    assert alone.recipe.data.pair is None


def test_bf16_base_keeps_what_is_trained_in_fp32(raw: Sections, tmp_path: Path) -> None:
    run = start(changed(raw, "model.dtype=bf16"), tmp_path)
    dtypes = {p.requires_grad: p.dtype for p in run.prepared.model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert run.fit().scores["dtype"] == "bfloat16"
    assert {t.dtype for t in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()} == {torch.float32}


# The best checkpoint


def scripted(monkeypatch: pytest.MonkeyPatch, accuracies: list[float]) -> None:
    """Let the evaluations of a run come out as written here."""
    coming = chain(accuracies, repeat(accuracies[-1]))  # at the end it is evaluated with what was tuned once more

    def evaluate(*_: object) -> Evaluation:
        return Evaluation({"accuracy": next(coming)}, {}, {"temperature": 1.0})

    monkeypatch.setattr(SequenceClassification, "evaluate", evaluate)


def run_with(raw: Sections, folder: Path, *words: str) -> tuple[list[Event], dict[int, dict[str, Tensor]]]:
    """The events of a run, and the trained parameters after each step."""
    events: list[Event] = []
    after: dict[int, dict[str, Tensor]] = {}

    def report(event: Event) -> None:
        events.append(event)
        if isinstance(event, Step):
            after[event.number] = values(run.prepared)

    run = start(changed(raw, *words), folder, report)
    run.fit()
    after[0] = values(run.prepared)
    return events, after


@pytest.mark.parametrize(
    ("accuracies", "best"),
    [
        ([0.1, 0.9, 0.5, 0.9, 0.3], 2),
        ([0.1, 0.2, 0.3, 0.4, 0.6], 5),
        ([0, 0, 0, 0, 0], 1),
    ],
    ids=["the earlier of two peaks", "the last", "nothing right"],
)
def test_best_checkpoint_is_kept(
    raw: Sections, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accuracies: list[float], best: int
) -> None:
    scripted(monkeypatch, [*map(float, accuracies), 1.0])  # the last one is the final scoring of the best
    events, after = run_with(raw, tmp_path, "train.eval_every=1", "train.max_steps=5")
    assert [e.step for e in events if isinstance(e, Evaluated) and e.is_best][-1] == best
    assert scores_of(tmp_path)["best_step"] == best
    assert scores_of(tmp_path)["last"] == {"accuracy": accuracies[-1]}
    assert all(torch.equal(after[0][name], value) for name, value in after[best].items())
    on_disk = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    path = "classifier.adapters.default.weight"
    assert torch.equal(on_disk["base_model.model.classifier.weight"], after[best][path])


def test_patience_stops_early(raw: Sections, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [0.3, 0.6, 0.6, 0.5, 1.0])
    events, _ = run_with(raw, tmp_path, "train.eval_every=1", "train.patience=2")
    assert max(e.number for e in events if isinstance(e, Step)) == 4
    assert any(isinstance(e, Note) and "stopped at step 4" in e.text for e in events)
    assert scores_of(tmp_path)["best_step"] == 2


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (("train.max_steps=7",), [5, 7]),
        (("train.eval_every=4",), [4, 8, 10]),
        (("train.max_steps=3", "train.eval_every=3"), [3]),
    ],
    ids=["each epoch and the last step", "eval_every and the end", "once"],
)
def test_evaluations_come_when_they_are_due(
    raw: Sections, tmp_path: Path, words: tuple[str, ...], steps: list[int]
) -> None:
    events, _ = run_with(raw, tmp_path, *words)
    assert [e.step for e in events if isinstance(e, Evaluated)] == steps
    assert next(e for e in events if isinstance(e, Started)) == Started(steps[-1], 0, "accuracy")
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl") if "validation" in line] == steps
    saved = [int(path.name.removeprefix("step-")) for path in (tmp_path / "checkpoints").iterdir()]
    assert sorted(saved) == steps[-2:]  # checkpoints come with evaluations


# Numbers that are none


def assert_finite_on_disk(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        assert all(t.isfinite().all() for t in load_file(path).values() if t.is_floating_point()), path
    for path in [*folder.rglob("*.json"), *folder.rglob("*.jsonl")]:
        assert not any(word in path.read_text() for word in ("NaN", "Infinity")), path


@pytest.mark.parametrize(("bad", "at"), [(math.nan, 1), (math.inf, 6)])
def test_non_finite_loss_stops_the_run(
    raw: Sections, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: float, at: int
) -> None:
    loss, calls = SequenceClassification.losses, []

    def spoiled(self: SequenceClassification, model: torch.nn.Module, batch: dict) -> Tensor:
        calls.extend([1] * torch.is_grad_enabled())  # of steps, not of evaluations
        return loss(self, model, batch) * (bad if len(calls) == at and torch.is_grad_enabled() else 1)

    monkeypatch.setattr(SequenceClassification, "losses", spoiled)
    run = start(changed(raw), tmp_path)
    with pytest.raises(NumericsError, match=rf"step {at}: the loss is (nan|inf).*train\.lr") as caught:
        run.fit()
    assert caught.value.exit_code == 4
    assert all(value.isfinite().all() for value in values(run.prepared).values())
    assert_finite_on_disk(tmp_path)


def test_weights_that_overflow_are_not_written(raw: Sections, tmp_path: Path) -> None:
    words = ("train.lr=1e38", "train.head_lr=1e39", "train.max_steps=1", "train.warmup=0")
    with pytest.raises(NumericsError, match=r"step 1: .* is not finite after the update"):
        fit(changed(raw, *words), tmp_path)
    assert_finite_on_disk(tmp_path)


def test_answers_that_are_no_numbers_are_not_written(raw: Sections, tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match="not finite"):
        fit(changed(raw, "train.lr=1e30", "train.max_steps=1", "train.warmup=0"), tmp_path)
    assert_finite_on_disk(tmp_path)
    assert not (tmp_path / "scores.json").exists()


# The run folder

CONTENT = {
    "adapter",
    "architecture.svg",
    "checkpoints",
    "loss.png",
    "metrics.jsonl",
    "predictions.jsonl",
    "resamples.json",
    "recipe.toml",
    "report.html",
    "samples.jsonl",
    "scores.json",
}
RUNS = {"bert_run": "accuracy", "tagger_run": "entity_f1", "t5_run": "entity_f1"}


@pytest.fixture(params=RUNS)
def run_and_metric(request: pytest.FixtureRequest) -> tuple[Path, str]:
    return request.getfixturevalue(request.param), RUNS[request.param]


def test_run_folder_is_complete(run_and_metric: tuple[Path, str]) -> None:
    folder, _ = run_and_metric
    assert {path.name for path in folder.iterdir()} == CONTENT
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    adapter = {path.name for path in (folder / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "lorakit.json", "tokenizer_config.json"} <= adapter
    assert "config.json" not in adapter


def test_scores_are_those_of_the_best_evaluation_with_intervals_and_resamples(run_and_metric: tuple[Path, str]) -> None:
    folder, metric = run_and_metric
    scores, lines = scores_of(folder), read_lines(folder / "metrics.jsonl")
    evaluations = [line for line in lines if "validation" in line]
    assert (scores["metric"], scores["evaluations"]) == (metric, len(evaluations))
    assert scores[metric] == max(line["validation"][metric] for line in evaluations)
    assert scores["best_step"] == next(line["step"] for line in reversed(evaluations) if line["is_best"])
    assert scores["examples"] == {"train": 36, "validation": 12}
    side = json.loads((folder / "adapter" / "lorakit.json").read_text(encoding="utf-8"))
    assert side["scores"][metric] == scores[metric]
    low, high = scores["intervals"][metric]
    assert low <= scores[metric] <= high
    resamples = read_resamples(folder)
    assert (resamples.metric, resamples.n) == (metric, scores["examples"]["validation"])
    assert intervals(resamples.scores, resamples.n) == {
        name: pytest.approx(interval, abs=10**-DIGITS) for name, interval in scores["intervals"].items()
    }
    for name, score in resamples.scores.items():
        assert score.value == pytest.approx(scores[name])
    losses = [line for line in lines if "loss" in line]
    assert [line["step"] for line in losses] == list(range(1, len(losses) + 1))
    assert all({"step", "epoch", "loss", "lr", "grad_norm", "examples_per_s"} == set(line) for line in losses)


def test_recipe_of_the_folder_gives_its_examples_and_its_picture(run_and_metric: tuple[Path, str]) -> None:
    folder, metric = run_and_metric
    recipe = read_recipe(folder / "recipe.toml")
    assert recipe.to_toml() == (folder / "recipe.toml").read_text(encoding="utf-8")
    assert recipe.output.dir == str(folder)
    assert Recipe.model_validate(recipe.model_dump()) == recipe
    prepared, lines = prepare(recipe), read_lines(folder / "predictions.jsonl")
    examples = prepared.parts["validation"].examples
    assert [line["text"] for line in lines] == [example.text for example in examples]
    assert read_lines(folder / "samples.jsonl") == lines[:SAMPLES]
    if metric == "accuracy":
        assert [line["expected"] for line in lines] == [example.label for example in examples]
        right = sum(line["label"] == line["expected"] for line in lines)
        assert scores_of(folder)["accuracy"] == right / len(lines)
    texts = [node.text or "" for node in ET.parse(folder / "architecture.svg").iter() if node.tag.endswith("text")]
    counts = count_parameters(prepared.model)
    (summary,) = (text for text in texts if "parameters are trained" in text)
    assert summary.startswith(f"{counts.trainable:,} of {counts.total:,} parameters")
    assert f"{counts.lora:,} in low-rank updates, {counts.saved:,} in whole modules" in texts


def test_full_fine_tuning_leaves_a_plain_model(raw: Sections, tmp_path: Path) -> None:
    fit(changed(raw, "train.method=full"), tmp_path)
    assert not (tmp_path / "adapter").exists()
    assert {"config.json", "model.safetensors", "lorakit.json"} <= {p.name for p in (tmp_path / "model").iterdir()}


def test_test_part_is_scored_at_the_end(raw: Sections, files: Path, tmp_path: Path) -> None:
    result = fit(changed(raw, f"data.test={files / 'train.csv'}"), tmp_path)
    low, high = result.scores["test"]["intervals"]["accuracy"]
    assert 0 <= low <= result.scores["test"]["accuracy"] <= high <= 1
    assert result.scores["examples"]["test"] == result.scores["examples"]["train"]


# Refused before anything is written


def test_prepare_holds_out_a_share_by_seed(raw: Sections) -> None:
    recipe = {**raw, "data": {"train": raw["data"]["train"], "validation_share": 0.25}}
    notes: list[Event] = []
    first, again, other = (prepare(changed(recipe, f"train.seed={seed}"), notes.append).parts for seed in (1, 1, 2))
    assert [len(first[name].examples) for name in ("train", "validation")] == [27, 9]
    assert first["validation"].examples == again["validation"].examples != other["validation"].examples
    assert any(isinstance(note, Note) and "9 examples (25%) are held out" in note.text for note in notes)


def test_prepare_knows_a_rare_label_wherever_the_split_puts_it(raw: Sections, tmp_path: Path) -> None:
    (tmp_path / "rare.csv").write_text("text,label\na,good\nb,good\nthe,bad\nfilm,fair\n")
    recipe = {**raw, "data": {"train": str(tmp_path / "rare.csv"), "validation_share": 0.5}}
    for seed in range(4):
        assert prepare(changed(recipe, f"train.seed={seed}")).task.labels == ("bad", "fair", "good")


def test_prepare_says_which_layers_are_too_small_for_the_rank(raw: Sections, tmp_path: Path) -> None:
    """ESM's contact head has one output; the default settings train without it."""
    folder = save_bert(tmp_path / "esm")
    config = transformers.EsmConfig(vocab_size=100, mask_token_id=4, pad_token_id=0, **SIZES)
    transformers.EsmModel(config).save_pretrained(folder)
    notes: list[Event] = []
    prepared = prepare(changed(raw, f"model.base={folder}"), notes.append)
    assert [target.path for target in prepared.targets if "contact_head" in target.path] == []
    assert (
        Note("lora.target_modules = 'all-linear' leaves out esm.contact_head.regression (too small for r = 4)") in notes
    )


def test_records_that_are_left_out_are_counted_in_the_scores(raw: Sections, files: Path, tmp_path: Path) -> None:
    rows = (files / "train.csv").read_text().splitlines()
    (tmp_path / "gaps.csv").write_text("\n".join([rows[0], "no label,", *rows[1:], ",good"]) + "\n")
    recipe = changed(raw, f"data.train={tmp_path / 'gaps.csv'}", "train.max_steps=1")
    with pytest.raises(DataError, match=r"2 records cannot be used; .*data\.on_bad=skip"):
        prepare(recipe)
    fit(changed(raw, f"data.train={tmp_path / 'gaps.csv'}", "train.max_steps=1", "data.on_bad=skip"), tmp_path / "run")
    scores = scores_of(tmp_path / "run")
    assert (scores["left_out"], scores["examples"]["train"]) == ({str(tmp_path / "gaps.csv"): 2}, len(rows) - 1)
    columns = json.loads((tmp_path / "run" / "adapter" / "lorakit.json").read_text())["columns"]
    assert not {"on_bad", "group"} & columns.keys()


def test_labels_that_people_read_as_one_are_told(raw: Sections, files: Path, tmp_path: Path) -> None:
    (tmp_path / "alike.csv").write_text((files / "train.csv").read_text() + "a film,Good\n")
    events: list[Event] = []
    prepare(changed(raw, f"data.train={tmp_path / 'alike.csv'}"), events.append)
    told = [event.text for event in events if isinstance(event, Note)]
    note = "labels that differ only in case, number format or invisible characters: 'Good' / 'good'"
    assert f"{note}; each is learned as a label of its own" in told
