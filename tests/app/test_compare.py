"""`lorakit compare`: groups of seeds, paired tests, and the verdict in words."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lorakit.app.report.comparison import compare_runs
from lorakit.data.example import Example
from lorakit.errors import ConfigError, DataError, OutputError
from lorakit.tasks.metrics.bootstrap import Statistic, resample
from lorakit.tasks.metrics.labels import accuracy
from lorakit.training.run_files import RESAMPLES_FILE, read_resamples, sampled, write_resamples
from tests.app.conftest import Cli
from tests.runs import changed, fit, sections

N = 400


def rights(share: float, seed: int = 0) -> list[bool]:
    return [bool(x) for x in np.random.default_rng(seed).permutation(np.arange(N) < round(share * N))]


def made(
    folder: Path,
    right: Sequence[bool],
    *,
    lr: float = 1e-3,
    seed: int = 0,
    metric: str = "accuracy",
    word: str = "text",
) -> Path:
    """A run folder with these right answers, as far as `compare` looks at it."""
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(f'[train]\nlr = {lr}\nseed = {seed}\n[output]\ndir = "{folder.name}"\n')
    examples = [Example(f"{word} {i}", "yes") for i in range(len(right))]
    errors = np.array([(not r, 1) for r in right], dtype=float)
    statistic = accuracy(right) if metric == "accuracy" else Statistic(errors, lambda s: 30 * s[..., 0] / s[..., 1])
    write_resamples(folder, sampled(examples, metric, resample({metric: statistic})))
    lines = [json.dumps({"text": example.text, "expected": example.label}) for example in examples]
    (folder / "predictions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_verdict_names_the_better_run_with_mcnemar_s_p(tmp_path: Path) -> None:
    first, second = rights(0.8, seed=1), rights(0.9, seed=2)
    shown = compare_runs([made(tmp_path / "a", first), made(tmp_path / "b", second, lr=1e-2)])
    gained = sum(b and not a for a, b in zip(first, second, strict=True))
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    (comparison,) = shown.facts["comparisons"]
    p = stats.binomtest(gained, gained + lost).pvalue
    assert comparison["differences"]["accuracy"]["p"] == pytest.approx(p)
    assert comparison["verdict"].startswith("B is better than A by 10.0 points accuracy, 95 % interval ")
    assert shown.lines[-1] == comparison["verdict"]
    swapped = compare_runs([tmp_path / "b", tmp_path / "a"]).lines[-1]
    assert swapped == comparison["verdict"].replace("B is better than A", "A is better than B")


@pytest.mark.parametrize(
    ("metric", "verdict"),
    [
        (
            "accuracy",
            r"no difference between A and B.*; the verdict is about accuracy; of the other scores, recall is better for B \(p ",
        ),
        ("recall", r"B is better than A by .* recall, .*; the verdict is about recall, and no other score differs$"),
    ],
)
def test_verdict_says_which_score_decides_and_what_the_others_show(tmp_path: Path, metric: str, verdict: str) -> None:
    """The table had macro-F1 at p 0.002 below a verdict of no difference in accuracy."""
    for name, share in (("a", 0.5), ("b", 0.9)):
        folder = made(tmp_path / name, rights(0.8, 1), lr=share)
        examples = [Example(f"text {i}", "yes") for i in range(N)]
        statistics = {"accuracy": accuracy(rights(0.8, 1)), "recall": accuracy(rights(share, 2))}
        write_resamples(folder, sampled(examples, metric, resample(statistics)))
    shown = compare_runs([tmp_path / "a", tmp_path / "b"])
    assert re.match(verdict, shown.lines[-1])


def test_verdict_says_what_the_examples_could_have_shown(tmp_path: Path) -> None:
    runs = [made(tmp_path / name, rights(0.8, seed), lr=seed) for name, seed in (("a", 1), ("b", 2))]
    verdict = compare_runs(runs).lines[-1]
    assert "no significant difference" in verdict and f"{N} examples can show about" in verdict
    (_, shown) = verdict.split("examples can show about ")
    variance = 2 * 0.8 * 0.2 / N  # of the difference of two independent shares
    assert float(shown.split()[0]) == pytest.approx(100 * 2.8 * variance**0.5, rel=0.2)


def test_lower_errors_are_better_and_have_their_own_unit(tmp_path: Path) -> None:
    runs = [made(tmp_path / name, rights(share, 1), lr=share, metric="mae") for name, share in (("a", 0.9), ("b", 0.5))]
    assert compare_runs(runs).lines[-1].startswith("A is better than B by 12 mae, 95 % interval ")
    assert compare_runs(runs[::-1]).lines[-1].startswith("B is better than A by 12 mae, 95 % interval ")


def test_runs_that_differ_in_the_seed_alone_are_one_group(tmp_path: Path) -> None:
    shares = (0.7, 0.72, 0.8)
    runs = [made(tmp_path / str(seed), rights(share), seed=seed) for seed, share in enumerate(shares)]
    shown = compare_runs(runs)
    assert shown.facts["comparisons"] == []
    assert shown.facts["groups"]["A"]["seeds"] == [0, 1, 2]
    wanted = {"mean": statistics.mean(shares), "deviation": statistics.stdev(shares), "n": 3}
    assert shown.facts["groups"]["A"]["scores"]["accuracy"] == {k: pytest.approx(v) for k, v in wanted.items()}
    assert shown.lines[-1] == f"{'accuracy':<22} {statistics.mean(shares):.4f} ± {statistics.stdev(shares):.4f}"


def test_groups_are_compared_over_pairs_of_equal_seeds(tmp_path: Path) -> None:
    first = [made(tmp_path / f"a{seed}", rights(0.7, seed), seed=seed) for seed in (0, 1, 2)]
    second = [made(tmp_path / f"b{seed}", rights(0.9, seed + 9), seed=seed, lr=1e-2) for seed in (2, 1, 5)]
    shown = compare_runs([*first, *second])
    (comparison,) = shown.facts["comparisons"]
    assert comparison["pairs"] == 2
    difference = comparison["differences"]["accuracy"]
    assert difference["value"] == pytest.approx(0.2)
    assert difference["test"] == "paired bootstrap"


def test_groups_without_an_equal_seed_are_refused(tmp_path: Path) -> None:
    runs = [made(tmp_path / f"a{seed}", rights(0.7), seed=seed) for seed in (0, 1)]
    runs += [made(tmp_path / f"b{seed}", rights(0.7), seed=seed, lr=1e-2) for seed in (2, 3)]
    with pytest.raises(
        ConfigError, match=r"has the seeds 0, 1, .*b2 has 2, 3; groups can only be compared if they share seeds"
    ):
        compare_runs(runs)


def test_every_later_group_is_compared_with_the_first(tmp_path: Path) -> None:
    runs = [made(tmp_path / name, rights(0.7, i), lr=i + 1) for i, name in enumerate("abc")]
    shown = compare_runs(runs)
    assert [(c["first"], c["second"]) for c in shown.facts["comparisons"]] == [("A", "B"), ("A", "C")]
    assert "2 comparisons" in shown.lines[-1]


def test_verdict_is_about_another_score_where_the_headline_cannot_be_resampled(tmp_path: Path) -> None:
    runs = [made(tmp_path / name, rights(0.8), lr=i + 1) for i, name in enumerate("ab")]
    for run in runs:
        raw = json.loads((run / RESAMPLES_FILE).read_text())
        (run / RESAMPLES_FILE).write_text(json.dumps({**raw, "metric": "macro_average_precision"}))
    shown = compare_runs(runs)
    assert shown.facts["comparisons"][0]["metric"] == "accuracy"
    assert shown.lines[-1] == "no difference between A and B: the same accuracy on every resample"


@pytest.mark.parametrize(
    ("n", "verdict"),
    [(1, "no verdict: 1 example cannot show a difference in nll (here -1); use more"), (3, "no verdict: 3 examples")],
)
def test_too_few_examples_give_no_verdict(tmp_path: Path, n: int, verdict: str) -> None:
    runs = [made(tmp_path / name, [name == "b"] * n, lr=i + 1, metric="nll") for i, name in enumerate("ab")]
    for run in runs:
        raw = json.loads((run / RESAMPLES_FILE).read_text())
        assert raw["scores"]["nll"]["each"] == [float(run.name == "a")] * n
    shown = compare_runs(runs)
    (difference,) = shown.facts["comparisons"][0]["differences"].values()
    assert shown.lines[-1].startswith(verdict.replace("-1)", "-30)"))
    assert (difference["p"], difference["least_p"]) == (2 / 2**n, 2 / 2**n)
    assert "95 %" not in shown.lines[-1] and "too few examples" in shown.lines[-2]


# Refused


def test_runs_over_other_examples_are_refused_with_the_first_that_differs(tmp_path: Path) -> None:
    runs = [made(tmp_path / name, rights(0.8), lr=i + 1, word=name) for i, name in enumerate("ab")]
    with pytest.raises(
        DataError, match=r"b/predictions\.jsonl:1: 'b 0' / 'yes', but 'a 0' / 'yes' in .*a; .*--on DATA"
    ):
        compare_runs(runs)
    longer = made(tmp_path / "c", [*rights(0.8), True], lr=9, word="a")
    with pytest.raises(DataError, match=rf"c/predictions\.jsonl:{N + 1}: 'a {N}' / 'yes', but nothing in .*a;"):
        compare_runs([runs[0], longer])
    for run in runs:
        (run / "predictions.jsonl").unlink()
    with pytest.raises(DataError, match="scored on other examples than"):
        compare_runs(runs)


def test_runs_without_a_score_in_common_are_refused(tmp_path: Path) -> None:
    runs = [made(tmp_path / "a", rights(0.8)), made(tmp_path / "b", rights(0.8), lr=1, metric="mae")]
    with pytest.raises(ConfigError, match=r"is scored by accuracy and .*b by mae, so they have no score in common"):
        compare_runs(runs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"examples": 3}, "damaged: TypeError"),
        ({"examples": {"n": 3}}, "numbers are missing"),
        ({"scores": {"accuracy": {}}}, "damaged: KeyError"),
        ({"scores": []}, "damaged: AttributeError"),
    ],
)
def test_damaged_resamples_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = made(tmp_path / "a", rights(0.8)) / RESAMPLES_FILE
    raw = json.loads(path.read_text())
    for key, value in changes.items():
        raw[key] = {**raw[key], **value} if "n" in str(value) else value
    path.write_text(json.dumps(raw))
    with pytest.raises(OutputError, match=message):
        read_resamples(tmp_path / "a")


def test_folders_without_resamples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no such run folder"):
        read_resamples(tmp_path / "nowhere")
    with pytest.raises(OutputError, match=r"no resamples\.json; .*--on DATA"):
        read_resamples(tmp_path)
    (tmp_path / RESAMPLES_FILE).write_text("{")
    with pytest.raises(OutputError, match="damaged: JSONDecodeError"):
        read_resamples(tmp_path)


# The command


def test_command_compares_runs_by_their_folders_and_by_predicting(
    cli: Cli, bert: Path, bert_run: Path, files: Path, tmp_path: Path
) -> None:
    fit(changed(sections(bert, files), "train.lr=1e-9"), tmp_path / "untrained")
    of_files = json.loads(cli("compare", bert_run, "untrained", "--json").out)
    predicted = json.loads(cli("compare", bert_run, "untrained", "--on", files / "validation.csv", "--json").out)
    one, other = (c["comparisons"][0]["differences"]["accuracy"] for c in (of_files, predicted))
    assert one == {key: pytest.approx(v) if key != "test" else v for key, v in other.items()}
    assert cli("compare", bert_run, "untrained").out.splitlines()[-1] == of_files["comparisons"][0]["verdict"]


def test_command_compares_other_tasks_over_the_same_examples(
    cli: Cli, tagger_run: Path, t5_run: Path, files: Path
) -> None:
    code, out, _ = cli("compare", t5_run, tagger_run)
    assert code == 0
    assert "entity_f1_strict" in out


def test_command_takes_columns_with_on(cli: Cli, bert_run: Path, tmp_path: Path) -> None:
    (tmp_path / "odd.csv").write_text("review,verdict\na superb film,good\nstale,bad\n")
    words = ("--on", "odd.csv", "--text", "review", "--label", "verdict")
    code, out, err = cli("compare", bert_run, bert_run / "adapter", *words)
    assert (code, err) == (0, "")
    assert "no verdict: 2 examples cannot show a difference in accuracy" in out
