"""scikit-learn's estimators: its own checks and tools are the oracle, and what a run of the same recipe answers."""

from __future__ import annotations

import enum
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, ShuffleSplit, cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import estimator_checks

import lorakit
from lorakit.app.estimators import (
    EntityRecognizer,
    InputError,
    LoraEstimator,
    TextClassifier,
    TextEmbedder,
    TextRegressor,
    in_order,
)
from lorakit.data.read import read
from lorakit.errors import ConfigError, DataError, OutputError
from lorakit.recipe import read_recipe
from tests.runs import PEOPLE, PLACES, WORDS, reviews

TEXTS, LABELS = (list(column) for column in zip(*reviews(24), strict=True))
NUMBERS = [1.5 if label == "good" else -0.5 for label in LABELS]
SENTENCES = [[PEOPLE[i % 4], "visited", PLACES[i % 3], "."] for i in range(12)]
TAGS = [["B-PER", "O", "B-LOC", "O"] for _ in SENTENCES]


def short(base: Path, steps: int = 1, folds: int | str = 0, **more: Any) -> dict[str, Any]:
    """Arguments of an estimator that takes a step, without cross-validation, which trains each fold."""
    recipe = {"model": {"dtype": "fp32"}, "data": {"folds": folds}, "train": {"max_steps": steps, "warmup": 0.0}}
    return {"model": str(base), "lr": 2e-2, "batch_size": 8, "r": 2, "recipe": recipe, **more}


@pytest.fixture(scope="module")
def classifier(bert: Path) -> TextClassifier:
    return TextClassifier(**short(bert)).fit(TEXTS, LABELS)


@pytest.fixture(scope="module")
def recognizer(bert: Path) -> EntityRecognizer:
    return EntityRecognizer(**short(bert, steps=12)).fit(SENTENCES, TAGS)


# scikit-learn's own tools


def as_texts(X: Any) -> list[str]:
    """The numbers of scikit-learn's checks as words; what is no table of numbers stays as it is."""
    rows = np.asarray(X)
    return (
        X if rows.ndim != 2 else [" ".join(WORDS[int(7 * abs(x)) % len(WORDS)] for x in row) for row in rows.tolist()]
    )


class NumberClassifier(TextClassifier):
    def fit(self, X: Any, y: Any) -> Any:
        return super().fit(as_texts(X), y)

    def _answers(self, X: Any) -> list[dict[str, Any]]:
        return super()._answers(as_texts(X))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.one_d_array = True, False
        return tags


# What does not apply: checks of the number of features, of sparse, complex, infinite and missing numbers, of sample
# weights, of accuracy on tables of numbers, and of the sentences in which scikit-learn refuses them.
PLAIN = (
    "check_do_not_raise_errors_in_init_or_set_params",
    "check_estimator_cloneable",
    "check_estimator_repr",
    "check_estimator_tags_renamed",
    "check_get_params_invariance",
    "check_mixin_order",
    "check_no_attributes_set_in_init",
    "check_set_params",
    "check_valid_tag_types",
)
FITTED = (
    "check_classifiers_one_label",
    "check_classifiers_regression_target",
    "check_dict_unchanged",
    "check_estimators_pickle",
    "check_methods_sample_order_invariance",
)


@pytest.mark.parametrize("kind", [TextClassifier, TextRegressor, TextEmbedder, EntityRecognizer])
def test_estimators_pass_the_checks_of_arguments(kind: type[LoraEstimator]) -> None:
    for name in PLAIN:
        getattr(estimator_checks, name)(kind.__name__, kind())


@pytest.mark.parametrize("name", FITTED)
def test_classifier_passes_the_checks_of_fitting(bert: Path, name: str) -> None:
    getattr(estimator_checks, name)("NumberClassifier", NumberClassifier(**short(bert)))


def test_grid_search_over_the_rank_in_a_pipeline(bert: Path) -> None:
    steps = [("lower", FunctionTransformer(np.char.lower)), ("text", TextClassifier(**short(bert)))]
    search = GridSearchCV(Pipeline(steps), {"text__r": [2, 4]}, cv=ShuffleSplit(1, random_state=0), error_score="raise")
    search.fit(np.array(TEXTS), LABELS)
    assert [entry["text__r"] for entry in search.cv_results_["params"]] == [2, 4]
    found = search.best_estimator_.named_steps["text"]
    assert found.predictor_.task.labels == ("bad", "good") and found.r == search.best_params_["text__r"]


def test_cross_validation_trains_each_fold_and_leaves_nothing_on_the_disk(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    scores = cross_val_score(EntityRecognizer(**short(bert)), SENTENCES, TAGS, cv=2, error_score="raise")
    assert scores.shape == (2,) and not list(tmp_path.iterdir())


# Answers


@pytest.mark.usefixtures("no_pictures")
def test_classifier_answers_as_the_run_it_leaves(bert: Path, tmp_path: Path) -> None:
    numerals = ["9" if label == "good" else "10" for label in LABELS]  # in order as numbers, not as texts
    fitted = TextClassifier(**short(bert, folds="auto", folder=tmp_path / "run")).fit(TEXTS, numerals)
    answers = lorakit.load(tmp_path / "run").predict(TEXTS)
    assert fitted.predict(TEXTS).tolist() == [answer["label"] for answer in answers]
    wanted = [[answer["probabilities"][label] for label in ("10", "9")] for answer in answers]
    assert fitted.predictor_.task.labels == ("9", "10") and fitted.classes_.tolist() == ["10", "9"]
    assert fitted.predict_proba(TEXTS).tolist() == wanted
    assert fitted.predictor_.predict(TEXTS) == answers
    assert fitted.scores_["parameters"]["lora"] > 0
    note, budget, *pairs = fitted.notes_
    assert pairs and all("learns from pairs" in each for each in pairs)
    assert "cross-validation" in note and "24 training examples: model.dropout = 0, train." in budget
    examples = read(read_recipe(tmp_path / "run" / "recipe.toml").data.train or "").examples
    assert [(example.text, example.label) for example in examples] == list(zip(TEXTS, numerals, strict=True))
    with pytest.raises(OutputError, match=r"run\.jsonl exists already; choose another one"):
        clone(fitted).fit(TEXTS, LABELS)
    with pytest.raises(DataError, match=r"fit\(X, y\):1: column 'text' is empty"):
        clone(fitted).set_params(folder=tmp_path / "other").fit(["", "a"], [0, 1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.jsonl"]


def test_pickle_and_refit_of_a_clone_answer_bit_for_bit_alike(classifier: TextClassifier) -> None:
    expected = classifier.predict_proba(TEXTS)
    data = pickle.dumps(classifier)
    names: list[str] = []

    class Watched(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            names.append(module)
            return super().find_class(module, name)

    read = Watched(io.BytesIO(data)).load()
    assert not [name for name in names if name.split(".")[0] not in ("lorakit", "numpy", "pathlib", "_codecs")]
    assert np.array_equal(read.predict_proba(TEXTS), expected)
    fresh = clone(classifier)
    with pytest.raises(NotFittedError):
        fresh.predict(TEXTS)
    assert np.array_equal(fresh.fit(np.array(TEXTS), np.array(LABELS)).predict_proba(np.array(TEXTS)), expected)


class Mood(enum.Enum):
    SAD, GLAD = 0, 1


def test_labels_without_an_order_come_back_as_they_were(bert: Path) -> None:
    moods = [Mood.GLAD if label == "good" else Mood.SAD for label in LABELS]
    model = TextClassifier(**short(bert)).fit(TEXTS, moods)
    assert list(model.classes_) == [Mood.GLAD, Mood.SAD]
    assert [str(mood) for mood in model.predict(TEXTS)] == [
        answer["label"] for answer in model.predictor_.predict(TEXTS)
    ]


@pytest.mark.parametrize("labels", [[True, False], [1.0, 0.0], ["b", "a"], [(0, 1), (0, 0)]])
def test_classes_are_sorted_and_keep_their_type(labels: list[Any]) -> None:
    classes = in_order([*labels, *labels])
    assert classes.shape == (2,) and list(classes) == sorted(labels)
    assert classes.dtype == (object if isinstance(labels[0], tuple) else np.array(labels).dtype)


def test_pairs_of_texts_are_two_columns(bert: Path) -> None:
    pairs = [(text, f"a rather {label} film") for text, label in zip(TEXTS, LABELS, strict=True)]
    model = TextClassifier(**short(bert)).fit(pairs, LABELS)
    assert model.predictor_.side.columns.pair == "pair"
    assert np.array_equal(model.predict_proba(np.array(pairs)), model.predict_proba(pairs))
    with pytest.raises(DataError, match="text 1 of 24: this run was trained on pairs of texts"):
        model.predict(TEXTS)


def test_regressor_gives_numbers_and_scores_by_r2(bert: Path) -> None:
    from sklearn.metrics import r2_score

    model = TextRegressor(**short(bert, steps=4)).fit(TEXTS, np.array(NUMBERS))
    found = model.predict(TEXTS)
    assert found.shape == (len(TEXTS),) and model.score(TEXTS, NUMBERS) == r2_score(NUMBERS, found)


def test_recognizer_gives_a_tag_a_word_and_scores_as_seqeval(recognizer: EntityRecognizer) -> None:
    from seqeval.metrics import f1_score

    found = recognizer.predict(SENTENCES)
    assert [len(tags) for tags in found] == [len(words) for words in SENTENCES]
    gold = [["I-PER", "O", "I-LOC", "O"]] * 11 + [["O", "O", "B-LOC", "I-LOC"]]
    assert recognizer.score(SENTENCES, gold) == pytest.approx(f1_score(gold, found))
    assert recognizer.score(SENTENCES, found) == 1.0
    assert recognizer.classes_.tolist() == ["B-LOC", "B-PER", "I-LOC", "I-PER", "O"]
    assert np.array_equal(recognizer.predict(np.array(SENTENCES)), found)


# Mistakes


@pytest.mark.parametrize(
    ("X", "y", "message"),
    [
        ([], [], r"X is empty: a list of texts is expected"),
        ("a film", ["good"], r"X = 'a film': a list is expected"),
        (TEXTS, LABELS[:3], r"X has 24 examples but y has 3"),
        (TEXTS, ["good"] * 24, r"y: every example has the label 'good'; at least two classes"),
        (["a", " ", "b"], [0, 1, 1], r"fit\(X, y\):2: column 'text' is empty"),
        (["a", 3], [0, 1], r"X\[1\] = 3 is neither a text nor a pair of texts"),
        (["a", ("b", "c")], [0, 1], r"X\[1\] = \('b', 'c'\): some entries are pairs"),
        (["a", "b\ud800"], [0, 1], r"X\[1\] = .* half of a surrogate pair"),
        (["a", "b"], [0, None], r"y\[1\] = None is not a label"),
        (["a", "b"], [0, ["x"]], r"y\[1\] = \['x'\] is not a label"),
        (["a", "b"], [1, "1"], r"y: the labels 1 and '1' have the same name"),
        (["a", "b"], ["x", ""], r"fit\(X, y\):2: column 'label' is empty"),
    ],
)
def test_mistakes_in_texts_and_labels_are_one_line(bert: Path, X: Any, y: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as found:
        TextClassifier(**short(bert)).fit(X, y)
    assert "\n" not in str(found.value)


def test_labels_may_be_a_table_of_one_column(bert: Path) -> None:
    column = np.array(LABELS)[:, None]
    first, second = (TextClassifier(**short(bert)).fit(TEXTS, labels) for labels in (LABELS, column))
    assert np.array_equal(first.predict_proba(TEXTS), second.predict_proba(TEXTS))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"r": 0}, r"lora\.r = 0: should be greater"),
        ({"lr": "fast"}, r"train\.lr = 'fast'"),
        ({"recipe": {"lora": {"r": 3}}}, r"recipe: lora\.r = 3: use the estimator's r=\.\.\."),
        ({"recipe": {"data": {"train": "x.csv"}}}, r"recipe: data\.train = 'x\.csv': fit\(X, y\) sets it"),
        ({"recipe": {"lora": {"drpout": 0.1}}}, r"unknown key 'lora\.drpout'; did you mean 'lora\.dropout'"),
        ({"recipe": {"lora": 3}}, r"recipe: lora is not a table"),
    ],
)
def test_mistakes_in_arguments_are_refused_by_fit(bert: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TextClassifier(**short(bert, **more)).fit(TEXTS, LABELS)


@pytest.mark.parametrize(
    ("kind", "X", "y", "message"),
    [
        (TextClassifier, TEXTS, np.linspace(0, 1, 24), "Unknown label type: continuous"),
        (TextRegressor, ["a", "b"], [1.0, float("nan")], r"fit\(X, y\):2: column 'label' holds nan"),
        (TextRegressor, ["a", "b", "c"], [1, 1, 1], r"fit\(X, y\): every training example has the number 1"),
        (EntityRecognizer, [["a", "b"]], [["O"]], r"fit\(X, y\):1: 2 words but 1 tags"),
        (EntityRecognizer, [["a"]] * 3, [["O"]] * 3, r"fit\(X, y\): the training data has no entities"),
        (EntityRecognizer, ["a b"], [["O", "O"]], r"X\[0\] = 'a b': a list is expected"),
        (EntityRecognizer, [["a"]], [["PER"]], r"'PER' is not a tag"),
    ],
)
def test_mistakes_of_each_estimator(bert: Path, kind: type[LoraEstimator], X: Any, y: Any, message: str) -> None:
    with pytest.raises((DataError, ValueError), match=message):
        kind(**short(bert)).fit(X, y)


def test_score_refuses_tags_that_are_none(recognizer: EntityRecognizer) -> None:
    with pytest.raises(DataError, match=r"y\[0\] = \['PER', 'O', 'O', 'O'\]: a tag"):
        recognizer.score(SENTENCES[:1], [["PER", "O", "O", "O"]])


def test_embedder_is_a_step_of_a_pipeline(encoder: Path) -> None:
    """Vectors of texts with classes, of pairs, and of pairs with numbers; a pickle of it gives the same."""
    embedder = TextEmbedder(**short(encoder, steps=4))
    vectors = embedder.fit(TEXTS, LABELS).transform(TEXTS)
    assert vectors.shape == (len(TEXTS), 16)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(embedder)).transform(TEXTS), vectors)
    clusters = make_pipeline(clone(embedder), KMeans(2, n_init=1, random_state=0)).fit_predict(TEXTS, LABELS)
    assert set(clusters) == {0, 1}
    pairs = [(text, text.split()[-1]) for text in TEXTS]
    assert clone(embedder).fit(pairs).scores_["metric"] == "ndcg_at_10"
    assert clone(embedder).fit(pairs, NUMBERS).scores_["metric"] == "spearman"
    with pytest.raises(InputError, match=r"^y is missing: texts need a class each"):
        embedder.fit(TEXTS)
    with pytest.raises(InputError, match=r"^X holds pairs; vectors are of texts alone"):
        embedder.transform(pairs)
