"""`lorakit report`: what the page says, what it is made of, and that nothing from data becomes part of its markup."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import time
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn import metrics
from sklearn.dummy import DummyClassifier

from lorakit.app.arguments import next_folder
from lorakit.app.report.answers import answer_of, baseline, marked
from lorakit.app.report.charts import (
    AMBER,
    BLUE,
    GREEN,
    RED,
    calibration_chart,
    grouped,
    scores_over_steps,
    training_charts,
)
from lorakit.app.report.comparison import comparison_of
from lorakit.app.report.page import content_of, html, verdict, verdict_in
from lorakit.recipe import Recipe
from lorakit.task_info import TASKS
from lorakit.tasks.metrics.bootstrap import wilson
from lorakit.training.run_files import Line, Prediction, RunFiles, RunScores, Span, read_run
from tests.app.conftest import Cli
from tests.browser import PATH, Tab, browser
from tests.runs import changed, fit, scores_of, sections

RUNS = ("bert_run", "multi_label_run", "ordinal_run", "regression_run", "tagger_run", "t5_run")
VOID = {"meta", "img", "br", "path", "use", "rect"}
SVG = "svg g defs path use text clippath rect"
TAGS = (
    "html head meta title style body header nav main section footer h1 h2 h3 p ul li a div table thead tbody tr th td "
    "figure figcaption bdi mark small span strong pre code details summary img"
)
ATTRIBUTES = "class id lang charset content name http-equiv href role tabindex scope alt src aria-label aria-labelledby"


class Page(HTMLParser):
    """The elements of a page, and the text outside `style`."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, f"{tag} closes nothing"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def check_page(text: str) -> Page:
    """A page that stands alone, of known elements alone, with nothing in it that could run."""
    page = Page(text)
    assert page.open == []
    assert {tag for tag, _ in page.elements} <= set(f"{TAGS} {SVG}".split())
    for tag, attributes in page.elements:
        assert not any(key.startswith("on") for key in attributes), (tag, attributes)
        if tag not in SVG.split():
            assert set(attributes) <= set(ATTRIBUTES.split()), (tag, attributes)
        assert attributes.get("href", "#").startswith("#")
    assert all(image["src"].startswith("data:image/svg+xml;base64,") and image["alt"] for image in page.all("img"))
    assert "default-src 'none'" in page.all("meta")[1]["content"]
    ids = Counter(attributes["id"] for _, attributes in page.elements if "id" in attributes)
    assert [name for name, n in ids.items() if n > 1] == []
    named = {attributes.get("href", "#")[1:] for _, attributes in page.elements} - {""}
    assert named | {a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a} <= set(ids)
    assert len(page.all("h1")) == 1
    assert page.all("html") == [{"lang": "en"}]
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.all("svg"))
    assert all(head["scope"] in ("col", "row") for head in page.all("th"))
    return page


# Every task


@pytest.mark.parametrize("name", RUNS)
def test_every_task_is_reported(request: pytest.FixtureRequest, name: str) -> None:
    run = request.getfixturevalue(name)
    by_training = run / "report.html"  # of some of them
    markup = by_training.read_text() if by_training.exists() else html(content_of(read_run(run)))
    page = check_page(markup)
    scores = scores_of(run)
    text = "".join(page.texts)
    assert f"{scores['metric']}\n{scores[scores['metric']]:.4f}" in text
    assert f"{scores['parameters']['trainable']:,} of {scores['parameters']['total']:,}" in text
    assert json.loads((run / "adapter" / "lorakit.json").read_text())["base"]["sha256"] in text
    assert "not in the run folder" not in text.replace("architecture.svg is not", "")
    assert scores["machine"] in text and scores["ended"][:10] in text
    assert "lorakit compare OLD NEW" in text
    assert sum(answers.count("<li") for answers in re.findall(r'<ul class="answers flow">.*?</ul>', markup, re.S)) >= 8
    rows = re.findall(r'<th scope="row"><bdi>(\w[^<]*)</bdi><small class="gloss">(.*?)</small></th>', markup)
    assert len(rows) == len(read_run(run).scores.values) and all(gloss for _, gloss in rows), rows


def test_every_task_has_been_reported(request: pytest.FixtureRequest) -> None:
    found = {read_run(request.getfixturevalue(name)).section("task")["name"] for name in RUNS}
    # the lines of the first are those below, the others have tests of their own
    assert TASKS.keys() - found == {
        "text2text_classification",
        "text2text_generation",
        "embedding",
        "reranker",
        "multiple_choice",
    }
    lines = [Prediction(text="a", label="good", score=0.6, expected="good")]  # where answers are constrained
    lines += [Prediction(text="a", label=None, generated="goo", score=0.6, expected="good")]
    right, wrong = map(answer_of, lines)
    assert (right.error, right.answer, right.sureness) == (0, "good", [(0.6, True)])
    assert (wrong.error, wrong.answer, wrong.sureness) == (1, "goo", [(0.6, False)])


def luminance(color: str) -> float:
    """Relative luminance as WCAG 2.2 defines it."""
    shares = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return float(np.dot((0.2126, 0.7152, 0.0722), linear))


def contrast(one: str, other: str) -> float:
    low, high = sorted(luminance(color) for color in (one, other))
    return (high + 0.05) / (low + 0.05)


def test_colors_can_be_read_on_light_and_dark(bert_run: Path) -> None:
    pairs = re.findall(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\)", (bert_run / "report.html").read_text())
    for colors in ({name: color[i] for name, *color in pairs} for i in (0, 1)):
        for name in ("ink", "quiet", "blue", "red", "green"):
            assert contrast(colors[name], colors["paper"]) >= 4.5, name
        assert all(contrast(colors[name], colors["raised"]) >= 4.5 for name in ("ink", "quiet"))
        assert all(contrast(color, colors["paper"]) >= 3 for color in (BLUE, RED, GREEN, AMBER))  # of lines and dots


# Numbers


def test_calibration_is_that_of_the_scores(bert_run: Path) -> None:
    run = read_run(bert_run)
    pairs = [pair for p in run.predictions for pair in answer_of(p).sureness]
    assert f"expected calibration error {run.scores.values['ece']:.3f}" in calibration_chart(pairs).alt


def test_bins_of_the_chart_hold_each_answer_once() -> None:
    # on the edge of a bin, and beside it
    pairs = [(0.6, True), (0.61, False), (0.59, True), (1.0, True), (0.01, False)]
    bins = grouped(pairs)
    assert [(each.n, each.right) for each in bins] == [(1, 0.0), (2, 1.0), (1, 0.0), (1, 1.0)]


BASELINES = {
    "accuracy": metrics.accuracy_score,
    "macro_f1": lambda gold, found: metrics.f1_score(gold, found, average="macro", labels=["a", "b"], zero_division=0),
    "f1": lambda gold, found: metrics.f1_score(gold, found, pos_label="b"),
    "mcc": metrics.matthews_corrcoef,
}


@pytest.mark.parametrize("metric", BASELINES)
@pytest.mark.parametrize("gold", ["aaab", "abbb"])
def test_baseline_is_the_dummy_classifier_s(metric: str, gold: str) -> None:
    table: dict[str, Any] = {name: {} for name in "ab"}
    scores = RunScores.model_validate({"metric": metric, metric: 0.5, "positive_label": "b", "per_class": table})
    found = baseline([Prediction(text="x", expected=label, label="a") for label in gold], scores)
    dummy = DummyClassifier().fit([[0]] * 4, list(gold)).predict([[0]] * 4)
    assert found is not None
    assert found.score == pytest.approx(BASELINES[metric](list(gold), dummy))


@pytest.mark.parametrize(("wrong", "n"), [(0, 7), (3, 10), (50, 50)])
def test_interval_of_a_share_is_wilson_s(wrong: int, n: int) -> None:
    expected = binomtest(wrong, n).proportion_ci(method="wilson")
    assert wilson(wrong, n) == pytest.approx((expected.low, expected.high), abs=1e-4)


def test_mistakes_are_the_wrong_answers(bert_run: Path, tagger_run: Path) -> None:
    run = read_run(bert_run)
    assert content_of(run).n_wrong == sum(p.label != p.expected for p in run.predictions)
    run = read_run(tagger_run)
    both = [
        [(e.entity_group, e.start, e.end) for e in side] for p in run.predictions for side in (p.entities, p.expected)
    ]
    assert content_of(run).n_wrong == sum(found != gold for found, gold in zip(both[::2], both[1::2], strict=True))


def span(kind: str, start: int, end: int) -> dict[str, Any]:
    return {"entity_group": kind, "start": start, "end": end, "score": 0.9}


@pytest.mark.parametrize("written", [False, True])
def test_every_wrong_entity_says_why(written: bool) -> None:
    gold = [span("PER", 0, 3), span("LOC", 4, 8), span("ORG", 9, 14), span("MISC", 20, 22)]
    found = [span("PER", 0, 3), span("PER", 4, 8), span("ORG", 9, 12), span("LOC", 15, 19)]
    expected = {"expected": "as text", "expected_entities": gold} if written else {"expected": gold}
    more = {"generated": "other text"} if written else {}
    answer = answer_of(Prediction(text="Ada Oslo Kones Mira at", entities=found, **expected, **more))
    assert (answer.error, answer.written) == (1, "other text" if written else "")
    faults = ("", "other type", "other boundary")
    assert [(p.text, p.fault) for p in answer.gold if p.label] == [
        *zip(("Ada", "Oslo", "Kones"), faults, strict=True),
        ("at", "missed"),
    ]
    assert [(p.text, p.fault) for p in answer.predicted if p.label] == [
        *zip(("Ada", "Oslo", "Kon"), faults, strict=True),
        ("Mira", "not there"),
    ]
    right = answer_of(Prediction(text="Ada Oslo", entities=gold[:1], expected=gold[:1]))
    assert (right.error, [p.fault for p in right.predicted]) == (0, ["", ""])


def test_marked_text_is_the_text() -> None:
    text = "x" * 700 + "Ada met Omar" + "y" * 700
    entity = Span(entity_group="PER", start=700, end=703)
    for around in (0, 700):
        pieces = marked(text, [entity], {("PER", 700, 703): "missed"}, around)
        shown = "".join(piece.text for piece in pieces)
        assert shown.strip(" …") in text
    assert [piece for piece in pieces if piece.label] == [("Ada", "PER", "missed")]


# The verdict: what it says of runs that went so or so, and the one thing that it tells to do


def run_that(folder: Path, scored: list[float], n: int = 100, right: float = 0.8, **scores: Any) -> RunFiles:
    """A run of two labels, half of each, that answers with this share of right answers after these evaluations."""
    labels, others = ["good", "bad"] * (n // 2), ["bad", "good"] * (n // 2)
    pairs = [(a, a if i < right * n else b) for i, (a, b) in enumerate(zip(labels, others, strict=True))]
    about = {"metric": "accuracy", "accuracy": right, "intervals": {"accuracy": [right - 0.1, right + 0.1]}}
    about |= {"examples": {"train": 400, "validation": n}, "evaluations": len(scored), "best_step": 10}
    by_label = {label: {"f1": right, "support": n / 2} for label in ("good", "bad")}
    (path := folder / "a run").mkdir(exist_ok=True)
    return RunFiles(
        path=path,
        scores=RunScores.model_validate({**about, "per_class": by_label, **scores}),
        lines=[Line(step=10 * i, validation={"accuracy": value}) for i, value in enumerate(scored)],
        predictions=[Prediction(text="x", expected=gold, label=given) for gold, given in pairs],
        side=None,
        recipe={"train": {"lr": 6e-4, "epochs": 4}, "data": {"max_length": 64}},
        recipe_text="",
        missing=[],
    )


VERDICTS = {
    "early": ([0.5, 0.8, 0.6, 0.6, 0.6], {}, "the run (0.8000) is better by 30.0 points", "train.lr=0.0003"),
    "late": ([0.5, 0.6, 0.7, 0.8], {}, "This is the best of 4 evaluations", "train.epochs=8"),
    "chance": ([0.5, 0.5, 0.5], {"right": 0.5}, "is not better by more than chance", "train.lr=0.002"),
    "below": ([0.9, 0.8, 0.7], {"linear_probe": 0.95}, "accuracy 0.9500: the run is worse by 15.0", "train.lr=0.0002"),
    "short": ([0.9, 0.5, 0.7], {"linear_probe": 0.95}, "accuracy 0.9500: the run is worse by 15.0", "train.epochs=20"),
    "probe": ([0.6, 0.7, 0.8], {"linear_probe": 0.6}, "accuracy 0.6000: the run is better by 20.0 points", "train.epochs=8"),
    "few": ([0.5, 0.5], {"right": 0.5, "examples": {"train": 20, "validation": 100}}, "Always", "train.epochs=8"),
    "cut": ([0.8], {"cut": {"train": 90}}, "Always", "data.max_length=128"),
    "guess": ([0.5], {"right": 0.5, "n": 20}, "With only 20 validation examples", "data.validation=FILE"),
}  # fmt: skip


@pytest.mark.parametrize("name", VERDICTS)
def test_verdict_says_how_the_run_went_and_what_would_help(tmp_path: Path, name: str) -> None:
    scored, changes, sentence, remedy = VERDICTS[name]
    run = run_that(tmp_path, scored, **changes)
    first, *said, command = verdict(run).lines
    assert first.startswith(f"accuracy {run.scores.values['accuracy']:.4f} (95 % interval ")
    assert sentence in " ".join(said)
    *_, what = re.split(r"lorakit train (?=')", command)
    recipe, *words = shlex.split(what.partition(", or ")[0])
    assert recipe == str(run.path / "recipe.toml")
    assert remedy in words and f"output.dir={run.path}-2" in words
    known = [word.partition("=")[0].split(".") for word in words]
    assert all(key in Recipe.model_fields[section].annotation.model_fields for section, key in known)


def test_numbers_of_folders_go_on(tmp_path: Path) -> None:
    for name in ("small", "small-2", "gpt-2"):
        (tmp_path / name).mkdir()
    free = [next_folder(tmp_path / name).name for name in ("small", "small-2", "gpt-2")]
    assert free == ["small-3", "small-3", "gpt-2-2"]


def test_texts_cut_are_a_share_of_all_texts(tmp_path: Path) -> None:
    """Of 400 pairs, say: 50 cut texts are few."""
    for texts, is_many in ({}, True), ({"train": 800}, False):
        steps = verdict(run_that(tmp_path, [0.8], cut={"train": 50}, texts=texts)).next_steps
        assert any("were truncated" in step for step in steps) == is_many


def test_a_fall_within_the_interval_calls_for_nothing(tmp_path: Path) -> None:
    for last, is_clear in ((0.75, False), (0.65, True)):
        steps = verdict(run_that(tmp_path, [0.5, 0.8, 0.75, last, last])).next_steps  # 0.7 to 0.9
        assert any("The best step was early" in step for step in steps) == is_clear


def test_labels_in_two_spellings_come_first(tmp_path: Path) -> None:
    by_label = {label: {"f1": 0.5, "support": 5} for label in ("No", "no", "yes")}
    step = verdict(run_that(tmp_path, [0.5], right=0.5, n=20, per_class=by_label)).next_steps[0]
    assert step.startswith("'No' / 'no' are learned as different labels. If they mean the same, spell them in one way")


def test_few_examples_of_a_cross_validation_are_added_to_its_file(tmp_path: Path) -> None:
    step = verdict(run_that(tmp_path, [0.5], right=0.5, n=20, folds=3)).next_steps[0]
    assert step.startswith("20 examples cannot show whether it has learned anything. Label more, add them to ")
    assert "data.validation" not in step


def test_verdict_of_several_seeds_is_their_mean_and_what_the_middle_one_says(tmp_path: Path) -> None:
    for seed, right in enumerate((0.9, 0.6, 0.75)):
        (tmp_path / f"seed-{seed}").mkdir()
        scores = run_that(tmp_path, [right], right=right, method="head").scores.model_dump_json()
        (tmp_path / f"seed-{seed}" / "scores.json").write_text(scores)
    first, *_, command = verdict_in(tmp_path).lines
    assert first.startswith(
        "accuracy 0.7500 (mean of 3 seeds, standard deviation 0.1500; what follows is of seed-2: 0.7500, 95 %"
    )
    assert f"{tmp_path}/recipe.toml" in command


def test_verdict_says_that_one_answer_is_all(tmp_path: Path) -> None:
    run = run_that(tmp_path, [0.5], right=0.5)
    lines = [p.model_copy(update={"label": "good"}) for p in run.predictions]
    said = "It gives the same answer to every validation example: 'good'."
    assert said in verdict(replace(run, predictions=lines)).sentences
    assert said not in verdict(run).sentences
    alike = [p.model_copy(update={"expected": "good"}) for p in lines]
    assert said not in verdict(replace(run, predictions=alike)).sentences


@pytest.mark.parametrize(
    ("trained", "judged", "overfits"),
    [
        ([0.6, 0.5, 0.4, 0.2, 0.1], [0.7, 0.5, 0.6, 0.6, 0.8], True),
        ([0.6, 0.5, 0.4, 0.2, 0.1], [0.7, 0.5, 0.51, 0.6, 0.8], False),  # hardly more than the lowest
        ([0.6, 0.5, 0.4, 0.2, 0.1], [0.7, 0.6, 0.5, 0.6, 0.8], False),  # for two evaluations alone
        ([0.6, 0.5, 0.6, 0.8, 0.9], [0.7, 0.5, 0.6, 0.6, 0.8], False),  # training diverges too
    ],
)
def test_over_fitting_is_said_where_validation_loss_rises_and_training_loss_falls(
    tmp_path: Path, trained: list[float], judged: list[float], overfits: bool
) -> None:
    run = run_that(tmp_path, [0.5, 0.8, 0.7, 0.7, 0.7])
    lines = [
        line.model_copy(update={"validation": {"accuracy": 0.7, "loss": loss}})
        for line, loss in zip(run.lines, judged, strict=True)
    ]
    lines += [Line(step=10 * i, loss=loss) for i, loss in enumerate(trained)]
    found = verdict(replace(run, lines=lines))
    said = "validation loss was lowest at step 10 (0.5), then rose to 0.8 while training loss fell"
    assert (said in str(found.sentences)) == overfits
    assert ("To reduce overfitting" in found.next_steps[0]) == overfits


@pytest.mark.parametrize("name", ["bert_run", "t5_run"])
def test_loss_of_training_and_validation_share_an_axis(request: pytest.FixtureRequest, name: str) -> None:
    run = read_run(request.getfixturevalue(name))
    chart = next(chart for chart in training_charts(run.lines, run.scores) if chart.name == "loss")
    drawn = scores_over_steps(run.lines, "loss")
    assert drawn == [(line.step, line.validation["loss"]) for line in run.lines if line.validation]
    assert len(drawn) == run.scores.evaluations
    assert f"validation lowest at step {min(drawn, key=lambda point: point[1])[0]}" in chart.alt


def test_score_that_stays_at_its_best_came_not_too_early(tmp_path: Path) -> None:
    assert "came early" not in str(verdict(run_that(tmp_path, [0.8, 0.8, 0.8])).next_steps)


def test_few_examples_that_choose_no_step_are_not_called_optimistic(tmp_path: Path) -> None:
    few = run_that(tmp_path, [0.5, 0.8], n=20)
    assert "optimistic" not in str(verdict(few).sentences)
    named = replace(few, recipe={**few.recipe, "data": {"validation": "some.csv"}})
    assert "optimistic" in str(verdict(named).sentences)


# Hostile texts

EVENTS = "onload onerror onclick onmouseover onfocus ontoggle onbegin onanimationstart onpointerenter onscroll onwheel"
ELEMENTS = ("img src=x", "svg", "body", "details open", "video", "iframe", "input autofocus", "math")
SCRIPT = "<script>alert(1)</script>"
PAYLOADS = [
    *(f"<{tag} {event}=alert(1)>" for tag in ELEMENTS for event in EVENTS.split()),
    *(f"{close}{SCRIPT}" for close in ("", '">', "'>", "</style>", "</title>", "-->", "]]>", "</text>")),
    *(f"{close}<svg>{SCRIPT}</svg>" for close in ("", "</svg>", "</bdi>", "</mark>", "</table>")),
    *(f"{quote} {event}={quote}alert(1)" for quote in "\"'" for event in EVENTS.split()),
    *(f"{s}alert(1)" for s in ("javascript:", "JaVaScRiPt:", "data:text/html,", "vbscript:", "java\tscript:")),
    *(f"{{{{ {code} }}}}" for code in ("7*7", "config", "self.__init__.__globals__", "''.__class__", "page")),
    *("{% for x in page %}{{ x }}{% endfor %}", "{% include 'style.css.jinja' %}", "${7*7}", "#{7*7}", "<%= 7*7 %>"),
    *("&lt;script&gt;", "&#60;script&#62;", "&amp;lt;", "&notanentity;", "&#x0;", "\x00<script>", "\x1b[31m"),
    *("\u202e<script>\u202c", "\u2066\u2067\u2068", "\u200f<b>", "\ufeff<i>", "\u2028\u2029", "\x85\x0b\x0c"),
    *(
        r"$\frac{",
        "$x$",
        "$$",
        r"\input{/etc/passwd}",
        "^{}_",
        "\\",
        "_",
        "%s%n",
        "{0}",
        "=cmd|'/c calc'!A1",
        "@SUM(1)",
    ),
    *("<!--", "-->", "<![CDATA[", "]]>", "<?php", "<!DOCTYPE html>", "<", ">", "\ufffe\uffff"),
    "<!ENTITY x SYSTEM 'file:///etc/passwd'>",
    *(f"<a href={quote}javascript:alert(1){quote}>x" for quote in ("", "'", '"')),
    *("<style>*{display:none}</style>", "<style>@import 'http://x'</style>"),
    "<style>a{background:url(javascript:alert(1))}</style>",
    *("<base href=//x>", "<meta http-equiv=refresh content=0>", "<link rel=stylesheet href=//x>", "<form action=//x>"),
    *("<object data=x>", "<embed src=x>", "<template><script>", "<noscript><p title='</noscript><img src=x>'>"),
    *(f"<{tag}>" for tag in ("plaintext", "xmp", "textarea", "title", "select", "frameset", "marquee", "use href=//x")),
    *("<image href=x>", "<foreignObject><script>", "<animate attributeName=href>", "<set onbegin=alert(1)>"),
    *(f"<scr{c}ipt>alert(1)" for c in ("\x00", "\t", "\n", "/", "\u200b", "<script>")),
    *("\u0130\u017f\u212a", "\U000e0041\U000e007f", "\U0001f600"),
    *(f"<{'x' * n}>" for n in (1, 100, 5000)),
    *(f"{name}<script>" for name in ("مرحبا", "漢字", "a\u0301" * 50, "🤖" * 20)),
    "<script>" * 125_000,  # one megabyte
]


def hostile(run: Path, folder: Path, *, entities: bool) -> Path:
    """A copy of a run with the payloads as texts, pairs, labels, types of entities, names and settings."""
    place = folder / "<img src=x onerror=alert(1)>'\"{{7*7}}"
    shutil.copytree(run, place, ignore=shutil.ignore_patterns("checkpoints", "*.safetensors", "metrics.jsonl"))
    lines: list[dict[str, Any]] = []
    for payload in PAYLOADS:
        if entities:
            found = {"entity_group": payload, "start": 0, "end": min(9, len(payload)), "word": payload, "score": 0.9}
            lines.append({"text": payload, "entities": [found], "expected": [{**found, "entity_group": f"{payload}!"}]})
        else:
            sure = {payload: 0.9, "other": 0.1}
            line = {"text": payload, "pair": payload, "label": payload, "score": 0.9, "probabilities": sure}
            lines.append({**line, "expected": f"{payload}!"})
    (place / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = scores_of(place)
    rows = {payload: {"precision": 0.1, "recall": 0.2, "f1": 0.1, "support": 3} for payload in PAYLOADS}
    few = [*PAYLOADS[:4], *(payload for payload in PAYLOADS if "$" in payload), *PAYLOADS[-8:]][:16]
    matrix = [[i + j for j in range(16)] for i in range(16)]
    scores |= {"per_class": rows, "confusion": {"labels": few, "matrix": matrix}}
    scores |= {"dtype": PAYLOADS[0], "examples": dict.fromkeys(PAYLOADS, 1), PAYLOADS[1]: 0.5}
    (place / "scores.json").write_text(json.dumps(scores))
    side = json.loads((place / "adapter" / "lorakit.json").read_text())
    side |= {"base": {"name": PAYLOADS[70], "sha256": "0" * 64, "revision": PAYLOADS[0]}}
    side |= {"data": dict(pairwise(PAYLOADS)), "versions": {PAYLOADS[3]: PAYLOADS[2]}}
    (place / "adapter" / "lorakit.json").write_text(json.dumps(side))
    (place / "architecture.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>")
    recipe = (place / "recipe.toml").read_text()
    (place / "recipe.toml").write_text(recipe + '[x]\ny = "</code></pre><script>alert(1)</script>"\n')
    return place


@pytest.mark.parametrize("entities", [False, True])
def test_no_payload_becomes_markup(
    bert_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entities: bool
) -> None:
    assert len(set(PAYLOADS)) >= 200
    monkeypatch.setattr("lorakit.app.report.page.WORST", len(PAYLOADS))
    text = html(content_of(read_run(hostile(bert_run, tmp_path, entities=entities))))
    page = check_page(text)
    assert len(text) < 2e6
    shown = "".join(page.texts)
    assert "<img src=x onload=alert(1)>" in shown
    assert "{{ 7*7 }}" in shown
    assert shown.count("alert(1)") >= len([payload for payload in PAYLOADS if "alert(1)" in payload])
    text.encode("utf-8")
    assert not set("\x00\x0b\x1b\x85\ufffe") & set(text)


ALARM = "<script>window.alert = () => document.documentElement.setAttribute('data-alarm', 'yes')</script>"


@pytest.mark.faults
@pytest.mark.skipif(PATH is None, reason="no Chromium here")
@pytest.mark.parametrize("entities", [False, True])
def test_no_payload_runs_in_a_browser(
    bert_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entities: bool
) -> None:
    """Without the content policy, so that nothing but the escaping stands in the way."""
    monkeypatch.setattr("lorakit.app.report.page.WORST", len(PAYLOADS))
    text = html(content_of(read_run(hostile(bert_run, tmp_path, entities=entities))))
    bare = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', ALARM, text)
    assert ALARM in bare
    guarded = text.replace("<main>", f"<main>{ALARM}{PAYLOADS[1]}<script>alert(1)</script>")
    with browser(tmp_path / "profile") as page:
        assert not alarms(page, tmp_path / "page.html", bare)
        assert alarms(page, tmp_path / "page.html", bare.replace("<main>", f"<main>{PAYLOADS[1]}"))
        assert not alarms(page, tmp_path / "page.html", guarded)  # the policy holds alone, too


def alarms(page: Tab, path: Path, text: str) -> bool:
    """Whether anything in a document has run a second after it was loaded."""
    path.write_text(text)
    page.open(path.as_uri())
    time.sleep(1)
    return bool(page.run("document.documentElement.hasAttribute('data-alarm')"))


# Files


def copied(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoints", "*.safetensors")))


def test_missing_file_is_named(cli: Cli, bert_run: Path, tmp_path: Path) -> None:
    run = copied(bert_run, tmp_path / "run")
    names = ("metrics.jsonl", "predictions.jsonl", "recipe.toml", "architecture.svg", "adapter/lorakit.json")
    for name in names:
        (run / name).unlink()
    code, out, err = cli("report", run)
    assert (code, err) == (0, "")
    text = "".join(check_page((run / "report.html").read_text()).texts)
    for name in names:
        assert f"{name} is missing from the run folder" in text
    assert out.splitlines()[-1] == f"report: {run / 'report.html'}"


LINE = '{"text": "a", "expected": "b"'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("scores.json", "{", "JSONDecodeError"),
        ("scores.json", "[" * 100_000, "RecursionError"),
        ("scores.json", '{"metric": 3}', "metric = 3: should be text"),
        ("scores.json", '{"metric": "a", "confusion": {"labels": ["a"], "matrix": []}}', ".*a row and a column"),
        ("metrics.jsonl", '{"step": 1}\n{"step": "x"}', "step = 'x': should be"),
        ("predictions.jsonl", f"{LINE}}}\n7\n", "7: should be an object"),
        ("predictions.jsonl", f'{LINE}, "score": NaN}}', "score = nan: should be a finite number"),
        ("predictions.jsonl", f'{LINE}, "value": 1}}', ".*the answer is a number where none"),
        ("recipe.toml", "[x", ""),
        ("adapter/lorakit.json", "\xff", "not valid UTF-8"),
    ],
)
def test_damaged_file_is_one_line(
    cli: Cli, bert_run: Path, tmp_path: Path, name: str, content: str, message: str
) -> None:
    run = copied(bert_run, tmp_path / "run")
    (run / name).write_bytes(content.encode("latin-1"))
    before = (run / "report.html").read_bytes()
    code, out, err = cli("report", run)
    assert (code, out, err.count("\n")) == (2, "", 1)
    line = f":{content.count(chr(10), 0, -1) + 1}" if name.endswith(".jsonl") else ""
    assert re.search(rf"{re.escape(name)}{line}: damaged: {message}", err)
    assert (run / "report.html").read_bytes() == before


# Several runs


@pytest.fixture(scope="module")
def head_run(bert: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "head"
    return fit(changed(sections(bert, files), "train.method=head", "train.lr=1e-4"), folder).folder


def test_runs_are_compared_as_compare_does(cli: Cli, bert_run: Path, head_run: Path) -> None:
    code, out, err = cli("report", bert_run, head_run)
    assert (code, err) == (0, "")
    page = check_page(Path("comparison.html").read_text())
    text = "".join(page.texts)
    verdict = cli("compare", bert_run, head_run).out.splitlines()[-1]
    assert verdict[1:] in out  # a sentence there, with a capital
    assert verdict[1:] in text
    assert "a linear probe" in text
    (table,) = [
        table for table in comparison_of([read_run(bert_run), read_run(head_run)]).tables if table.name == "settings"
    ]
    settings = {row[0]: list(row[1:]) for row in table.rows}
    assert settings["train.method"] == ["lora", "head"]
    assert settings.keys() == {"train.method", "train.lr"}


def test_folder_of_seeds_is_a_comparison(cli: Cli, bert_run: Path) -> None:
    for seed in (0, 1):
        place = copied(bert_run, Path("group") / f"seed-{seed}")
        (place / "recipe.toml").write_text((bert_run / "recipe.toml").read_text().replace("seed = 0", f"seed = {seed}"))
    code, out, err = cli("report", "group")
    assert (code, err) == (0, "")
    assert "over 2 seeds" in out
    check_page(Path("group/report.html").read_text())


def test_a_label_without_an_average_precision_is_read() -> None:
    row = {"f1": 0.0, "support": 0.0, "average_precision": None}
    assert RunScores.model_validate({"metric": "f1", "per_label": {"a": row}}).by_label == {
        "a": {"f1": 0.0, "support": 0.0}
    }
