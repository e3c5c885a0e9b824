"""Clients that others wrote ask the server as they do any other; each answer is that of the adapter's own Predictor."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from lorakit.app.server.answers import JSON_BYTES, outputs, tensors
from lorakit.inference.adapter_folder import read_side
from lorakit.inference.predictor import load
from tests.app.test_server import LIMITS, TEXTS, TOKEN, Running, serve
from tests.shipped import ship

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
    with pytest.raises(HfHubHTTPError, match="scores of this adapter are by softmax"):
        hub(running, token=TOKEN).text_classification("a", function_to_apply="sigmoid")
    with pytest.raises(HfHubHTTPError, match="top_k"):
        hub(running, token=TOKEN).text_classification("a", top_k=0)
    both = running.ask(
        "/models/tags", {"inputs": "a", "adapter": "mood"}, {**BEARER, "Content-Type": "application/json"}
    )
    assert (both.status, both.json["error"]) == (422, "`adapter`: the path names another one, 'tags'")


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


# tritonclient.http


@pytest.fixture
def triton(running: Running) -> Iterator[Any]:
    http = pytest.importorskip("tritonclient.http")
    client = http.InferenceServerClient(f"127.0.0.1:{running.port}")
    yield client
    client.close()


BEARER = {"Authorization": f"Bearer {TOKEN}"}


def tensor(texts: list[str], binary: bool = True, shape: tuple[int, ...] = ()) -> Any:
    from tritonclient.http import InferInput

    data = np.array([text.encode() for text in texts], dtype=object).reshape(shape or (len(texts),))
    return InferInput("text", list(data.shape), "BYTES").set_data_from_numpy(data, binary_data=binary)


@pytest.mark.parametrize("binary_input", [True, False])
@pytest.mark.parametrize("outputs", [None, {"probabilities": True, "label": True}, {"probabilities": False}])
def test_triton_client_gets_tensors(
    triton: Any, running: Running, binary_input: bool, outputs: dict[str, bool] | None
) -> None:
    from tritonclient.http import InferRequestedOutput

    texts = ["a fine film, she said", "\N{GRINNING FACE} \N{LATIN SMALL LETTER E WITH ACUTE}"]
    wanted = outputs and [InferRequestedOutput(name, binary_data=binary) for name, binary in outputs.items()]
    inputs = [tensor(texts, binary_input, (2, 1))]
    found = triton.infer("mood", inputs, outputs=wanted, headers=dict(BEARER), request_id="7")
    expected = load(running.root / "mood").predict(texts)
    shares = [list(answer["probabilities"].values()) for answer in expected]
    assert found.get_response()["id"] == "7"
    np.testing.assert_allclose(found.as_numpy("probabilities"), shares, atol=1e-5)
    assert [output["name"] for output in found.get_response()["outputs"]] == (
        list(outputs) if outputs else ["label", "score", "probabilities"]
    )
    if "label" in (outputs or ["label"]):
        assert [label.decode() for label in found.as_numpy("label")] == [answer["label"] for answer in expected]


def test_triton_client_sees_what_is_served(triton: Any, running: Running) -> None:
    assert triton.is_server_live() and triton.is_server_ready()
    assert "binary_tensor_data" in triton.get_server_metadata(BEARER)["extensions"]
    assert triton.is_model_ready("mood", "1", BEARER) and not triton.is_model_ready("mood", "2", BEARER)
    index = triton.get_model_repository_index(BEARER)
    assert [(model["name"], model["state"]) for model in index] == [("mood", "READY"), ("tags", "READY")]
    described = triton.get_model_metadata("tags", "1", BEARER)["outputs"]
    found = triton.infer("tags", [tensor(TEXTS[:2])], "1", headers=dict(BEARER))
    assert [(t["name"], t["datatype"]) for t in described] == [
        (t["name"], t["datatype"]) for t in found.get_response()["outputs"]
    ]
    assert described[-1]["parameters"] == {"labels": ["x", "y", "z"]}
    expected = load(running.root / "tags").predict(TEXTS[:2])
    assert [json.loads(text) for text in found.as_numpy("labels")] == [answer["labels"] for answer in expected]


def test_triton_client_is_refused_in_words(triton: Any) -> None:
    from tritonclient.http import InferRequestedOutput
    from tritonclient.utils import InferenceServerException

    wrong = InferRequestedOutput("logits")
    with pytest.raises(InferenceServerException, match="no tensor 'logits'; there are label, score"):
        triton.infer("mood", [tensor(["a"])], outputs=[wrong], headers=dict(BEARER))
    with pytest.raises(InferenceServerException, match="a token is needed"):
        triton.get_model_repository_index()
    with pytest.raises(InferenceServerException, match="batch size 5"):
        triton.infer("mood", [tensor(["a"] * 5)], headers=dict(BEARER))


def binary(data: bytes, size: Any = None, tail: bytes = b"") -> tuple[bytes, dict[str, str]]:
    size = len(data) if size is None else size
    text = {"name": "text", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": size}}
    body = json.dumps({"inputs": [text]}).encode()
    return body + data + tail, {JSON_BYTES: str(len(body))}


A = struct.pack("<I", 1) + b"a"
WRONG: list[tuple[tuple[bytes, dict[str, str]], int, str]] = [
    (binary(A, tail=b"x"), 422, "1 bytes of the body belong to no tensor"),
    (binary(A, size=6), 422, "5 bytes are left"),
    (binary(A, size="5"), 422, "binary_data_size of '5'"),
    (binary(A[:-1]), 422, "string 0 of a binary tensor ends after it"),
    (binary(A[:2]), 422, "string 0 of a binary tensor"),
    (binary(struct.pack("<I", 1) + b"\xff"), 422, "invalid start byte"),
    (binary(b"\0" * 8_000), 413, "a tensor has more than"),
    (binary(A + A), 422, "text has shape [1] but 2 strings"),
    ((b"{}", {JSON_BYTES: "3"}), 422, "is not a number of bytes"),
    ((b"{}", {JSON_BYTES: "-1"}), 422, "is not a number of bytes"),
    ((b"[]", {JSON_BYTES: "2"}), 422, "dictionary"),
    ((binary(A)[0], {**binary(A)[1], "Origin": "http://evil.example"}), 415, "application/json is needed"),
    ((binary(A)[0], {**binary(A)[1], "Content-Type": "text/plain"}), 415, "application/json is needed"),
]


@pytest.mark.parametrize(("request_", "status", "message"), WRONG)
def test_binary_tensors_that_do_not_fit_are_refused(
    running: Running, request_: tuple[bytes, dict[str, str]], status: int, message: str
) -> None:
    body, headers = request_
    reply = running.ask("/v2/models/mood/infer", body, {**BEARER, **headers})
    assert (reply.status, message in reply.json["error"]) == (status, True), reply.json


# What is said of the outputs is what comes


@pytest.mark.parametrize(
    "run", ["bert_run", "multi_label_run", "ordinal_run", "regression_run", "tagger_run", "t5_run"]
)
def test_metadata_describe_the_tensors_of_each_task(run: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(run) / "adapter"
    described, made = outputs(read_side(folder)), tensors(load(folder).predict(TEXTS[:2]))
    assert [(t["name"], t["datatype"], [2, *t["shape"][1:]]) for t in described] == [
        (t["name"], t["datatype"], t["shape"]) for t in made
    ]
