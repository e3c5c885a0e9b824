"""Clients that others wrote ask the server as they do any other; each answer is that of the adapter's own Predictor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from lorakit.inference.predictor import load
from tests.app.test_server import LIMITS, TEXTS, TOKEN, Running, serve
from tests.shipped import ship

BEARER = {"Authorization": f"Bearer {TOKEN}"}
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Path:
    folder = tmp_path_factory.mktemp("served")
    ship(folder / "mood", bert, "sequence_classification", ("bad", "good"), seed=1)
    ship(folder / "tags", bert, "multi_label_classification", ("x", "y", "z"), seed=3)
    return folder


@pytest.fixture(scope="module")
def running(root: Path) -> Iterator[Running]:
    with serve(root, TOKEN, replace(LIMITS, characters=400)) as server:
        yield server


@pytest.fixture(scope="module")
def tagging(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("tagging")
    ship(folder / "people", bert, "token_classification", TAGS, seed=3)
    with serve(folder) as server:
        yield server


# huggingface_hub.InferenceClient


def hub(running: Running, path: str = "", token: str | None = None) -> InferenceClient:
    return InferenceClient(model=f"http://127.0.0.1:{running.port}{path}", token=token)


def test_hub_client_gets_labels(running: Running) -> None:
    (expected,) = load(running.root / "mood").predict(TEXTS[:1])
    found = hub(running, token=TOKEN).text_classification(TEXTS[0])
    assert found[0].label == expected["label"]
    assert {e.label: e.score for e in found} == pytest.approx(expected["probabilities"], abs=1e-5)
    best = hub(running, "/models/tags", TOKEN).text_classification(TEXTS[0], top_k=1, function_to_apply="sigmoid")
    (expected,) = load(running.root / "tags").predict(TEXTS[:1])
    assert len(best) == 1
    assert best[0].score == pytest.approx(max(expected["probabilities"].values()), abs=1e-5)


def test_hub_client_is_refused_in_words(running: Running) -> None:
    with pytest.raises(HfHubHTTPError, match="401"):
        hub(running).text_classification("a")
    with pytest.raises(HfHubHTTPError, match="this adapter supports softmax and none"):
        hub(running, token=TOKEN).text_classification("a", function_to_apply="sigmoid")
    with pytest.raises(HfHubHTTPError, match="top_k"):
        hub(running, token=TOKEN).text_classification("a", top_k=0)
    both = running.ask(
        "/models/tags", {"inputs": "a", "adapter": "mood"}, {**BEARER, "Content-Type": "application/json"}
    )
    assert (both.status, both.json["error"]) == (422, "`adapter`: the path already names 'tags'")


def test_hub_client_gets_entities(tagging: Running) -> None:
    text = " ".join(TEXTS[:3])[:100]
    expected = load(tagging.root / "people").predict([text])[0]["entities"]
    found = hub(tagging).token_classification(text, aggregation_strategy="simple")
    assert [(e.entity_group, e.word, e.start, e.end) for e in found] == [
        (e["entity_group"], e["word"], e["start"], e["end"]) for e in expected
    ]
    kinds = {e.entity_group for e in found}
    assert kinds
    assert hub(tagging).token_classification(text, ignore_labels=sorted(kinds)) == []
    with pytest.raises(HfHubHTTPError, match="aggregation_strategy"):
        hub(tagging).token_classification(text, aggregation_strategy="none")
