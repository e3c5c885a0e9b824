"""Vectors from Python, from the command line and over HTTP, where embedding models share a base with other adapters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from huggingface_hub import InferenceClient
from openai import NotFoundError, OpenAI

import lorakit
from lorakit.app.report.page import content_of, html
from lorakit.app.report.similarities import Similarities
from lorakit.data.example import Example
from lorakit.errors import DataError, OutputError
from lorakit.inference.adapter_pool import AdapterPool, Query
from lorakit.training.run_files import Prediction, read_run
from tests.app.conftest import Cli
from tests.app.test_server import Running, serve
from tests.related import recipe
from tests.runs import changed, fit, sections

TEXTS = ["the film was superb", "a rather stale plot", "moving", "the cast was boring"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tables: Path, encoder: Path, bert_run: Path) -> Path:
    """Two embedding models (one has prompts and shorter vectors) and a classifier, by their names the last of them
    first."""
    folder = tmp_path_factory.mktemp("vectors")
    fit(recipe(encoder, tables / "classes.csv"), folder / "plain")
    prompts = ("task.query_prompt='the film '", "task.document_prompt='a '", "task.dims=[8]")
    fit(recipe(encoder, tables / "pairs.csv", *prompts), folder / "search")
    shutil.copytree(bert_run, folder / "classifier")
    return folder


@pytest.fixture(scope="module")
def served(runs: Path) -> Iterator[Running]:
    with serve(runs) as server:
        yield server


def test_vectors_are_of_one_length_and_read_prompts(runs: Path) -> None:
    search, plain = lorakit.load(runs / "search"), lorakit.load(runs / "plain")
    vectors = search.embed(TEXTS)
    assert vectors.shape == (4, 16) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(search.embed(TEXTS[2]), vectors[2], atol=1e-6)
    queries = search.embed(TEXTS, query=True)
    assert not np.allclose(queries, vectors, atol=1e-3)
    np.testing.assert_allclose(search.similarity(TEXTS, TEXTS), queries @ vectors.T, atol=1e-5)
    np.testing.assert_allclose(plain.embed(TEXTS, query=True), plain.embed(TEXTS), atol=1e-7)
    short = search.embed(TEXTS, dims=8)
    np.testing.assert_allclose(short, vectors[:, :8] / np.linalg.norm(vectors[:, :8], axis=1)[:, None], atol=1e-6)


def test_texts_are_ranked_by_their_cosine_with_the_query(runs: Path) -> None:
    search = lorakit.load(runs / "search")
    ranked = search.rank("superb", TEXTS)
    cosines = search.similarity(["superb"], TEXTS)[0]
    assert [entry["index"] for entry in ranked] == np.argsort(-cosines).tolist()
    assert ranked[0] == {"index": (best := int(cosines.argmax())), "score": cosines[best], "text": TEXTS[best]}
    assert search.rank("superb", TEXTS, top=2) == ranked[:2]


def test_each_text_goes_through_the_model_once(runs: Path) -> None:
    """The query of many pairs, in a pool and alone; a text that is query and document has another prompt as each."""
    pairs = [("superb", text) for text in (*TEXTS, TEXTS[0], "superb")]
    alone = lorakit.load(runs / "search")
    with AdapterPool({"search": runs / "search"}) as pool:
        pool.answer([Query("search", Example(*pairs[0][:1]))])
        for model, ask in (
            (alone.model, lambda: alone.predict(pairs)),
            (pool.shared.model, lambda: pool.answer([Query("search", Example(q, pair=text)) for q, text in pairs])),
        ):
            rows: list[int] = []
            hook = model.register_forward_hook(
                lambda module, inputs, output, rows=rows: rows.append(len(output.logits))
            )
            answers = ask()
            hook.remove()
            assert sum(rows) == 1 + len(TEXTS) + 1
            scores = alone.similarity(["superb"], [text for _, text in pairs])[0]
            np.testing.assert_allclose([answer["score"] for answer in answers], scores, atol=1e-6)


def test_what_gives_no_vector_is_refused(runs: Path) -> None:
    search, classifier = lorakit.load(runs / "search"), lorakit.load(runs / "classifier")
    with pytest.raises(DataError, match=r"^embed: this run's task, sequence_classification, does not make vectors"):
        classifier.embed(TEXTS)
    with pytest.raises(DataError, match=r"^rank: this run's task, sequence_classification, does not compare texts"):
        classifier.rank("a", TEXTS)
    wrong: dict[str, Any] = {
        r"text 2 of 2 is empty": ["a", " "],
        r"text 1 of 1 is not a text": [["a"]],
        r"embed: no texts": [],
    }
    for message, texts in wrong.items():
        with pytest.raises(DataError, match=message):
            search.embed(texts)
    with pytest.raises(DataError, match=r"dims = 17: the vectors have 16 dimensions"):
        search.embed(TEXTS, dims=17)


def test_several_processes_are_refused_before_they_start(cli: Cli, tables: Path) -> None:
    done = cli("train", tables / "pairs.csv", "--model", "minilm", "--task", "embedding", "--nproc", 2)
    assert done.code == 2 and done.err.count("trains in one process, not in 2") == 1


@pytest.mark.parametrize("ending", ["npy", "parquet"])
def test_command_writes_the_vectors_of_a_file(ending: str, runs: Path, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    done = cli(
        "embed", runs / "search", "--file", "texts.txt", "--out", f"v.{ending}", "--query", "--dims", 8, "--json"
    )
    assert done.code == 0, done.err
    assert json.loads(done.out) == {"out": f"v.{ending}", "texts": 4, "dims": 8}
    if ending == "npy":
        vectors = np.load("v.npy")
    else:
        table = pq.read_table("v.parquet")
        vectors = np.array(table["embedding"].to_pylist(), np.float32)
        assert table["text"].to_pylist() == TEXTS
    np.testing.assert_array_equal(vectors, lorakit.load(runs / "search").embed(TEXTS, query=True, dims=8))


def test_command_refuses_before_it_loads(runs: Path, cli: Cli, tmp_path: Path) -> None:
    for out, message in {"v.csv": "written as .npy or .parquet", "no/v.npy": "its folder does not exist"}.items():
        done = cli("embed", runs / "search", "--file", "texts.txt", "--out", out)
        assert done.code == 2 and message in done.err
    (tmp_path / "t.txt").write_text("a\n")
    done = cli("embed", runs / "classifier", "--file", "t.txt", "--out", "v.npy")
    assert done.code == 3 and "does not make vectors" in done.err and not Path("v.npy").exists()


def test_adapters_of_all_kinds_over_one_base_answer_as_alone(
    runs: Path, encoder: Path, tables: Path, files: Path, bert: Path, mean_run: Path, tmp_path: Path
) -> None:
    """Two classifiers, a tagger, two embedding models and a reranker: a mixed batch, with the weights in memory once."""
    reranker = changed(
        {**recipe(encoder, tables / "pairs.csv").model_dump(exclude_unset=True), "task": {"name": "reranker"}}
    )
    fit(reranker, tmp_path / "reranker")
    fit(changed(sections(bert, files, "token_classification"), "train.max_steps=2"), tmp_path / "tagger")
    folders = {"reranker": tmp_path / "reranker", "tagger": tmp_path / "tagger", "by-mean": mean_run}
    folders |= {name: runs / name for name in ("plain", "search", "classifier")}
    queries = [
        Query(name, Example(text, pair="superb" if name == "reranker" else None)) for text in TEXTS for name in folders
    ]
    with AdapterPool(folders) as pool:
        answers = pool.answer(queries)
        with pool.held(folders) as residents:
            models = {id(resident.shared.model): resident.shared.model for resident in residents.values()}
    weights = [
        {p.data_ptr() for name, p in model.named_parameters() if ".layer." in name and ".adapters." not in name}
        for model in models.values()
    ]
    assert len(weights) == 4 and all(each == weights[0] for each in weights)
    alone = {name: lorakit.load(folder) for name, folder in folders.items()}
    for (name, example), answer in zip(queries, answers, strict=True):
        (expected,) = alone[name].lines([example])
        for key in ("embedding", "score"):
            assert answer.get(key) == pytest.approx(expected.get(key), abs=1e-5)
        for one, other in zip(answer.get("entities", ()), expected.get("entities", ()), strict=True):
            assert (one["start"], one["end"], one["entity_group"]) == (
                other["start"],
                other["end"],
                other["entity_group"],
            )


def test_documented_requests_of_text_embeddings_inference(served: Running, runs: Path) -> None:
    """Those of its quick tour as they stand there, and one of /similarity; then with an adapter of ours."""
    plain, search = lorakit.load(runs / "plain"), lorakit.load(runs / "search")
    one = served.ask("/embed", b'{"inputs":"What is Deep Learning?"}').json
    np.testing.assert_allclose(one, plain.embed(["What is Deep Learning?"]), atol=1e-6)
    many = served.ask("/embed", b'{"inputs":["Today is a nice day", "I like you"]}').json
    np.testing.assert_allclose(many, plain.embed(["Today is a nice day", "I like you"]), atol=1e-6)
    body = b'{"input": "What is Deep Learning?", "model": "text-embeddings-inference", "encoding_format": "float"}'
    (entry,) = served.ask("/v1/embeddings", body).json["data"]
    np.testing.assert_allclose([entry["embedding"]], one, atol=1e-6)
    texts = '"texts": ["Deep Learning is not...", "Deep learning is..."]'
    ranked = served.ask("/rerank", f'{{"query":"What is Deep Learning?", {texts}, "raw_scores": false}}'.encode()).json
    expected = plain.rank("What is Deep Learning?", ["Deep Learning is not...", "Deep learning is..."])
    assert [entry["index"] for entry in ranked] == [entry["index"] for entry in expected]
    inputs = {"source_sentence": "superb", "sentences": TEXTS}
    cosines = served.ask("/similarity", {"inputs": inputs}).json
    np.testing.assert_allclose(cosines, plain.similarity(["superb"], TEXTS)[0], atol=1e-6)
    ours = {"inputs": TEXTS, "adapter": "search", "prompt_name": "query", "dimensions": 8}
    np.testing.assert_allclose(served.ask("/embed", ours).json, search.embed(TEXTS, query=True, dims=8), atol=1e-6)
    ask = {"query": "superb", "texts": TEXTS, "raw_scores": False, "adapter": "search"}
    ranked = served.ask("/rerank", {**ask, "return_text": True}).json
    expected = search.rank("superb", TEXTS)
    assert [{**entry, "score": 0} for entry in ranked] == [{**entry, "score": 0} for entry in expected]
    assert [set(entry) for entry in served.ask("/rerank", ask).json] == [{"index", "score"}] * 4


def test_hub_client_gets_vectors_and_similarities(served: Running, runs: Path) -> None:
    plain, server = lorakit.load(runs / "plain"), f"http://127.0.0.1:{served.port}"
    vectors = InferenceClient(model=f"{server}/embed").feature_extraction(TEXTS[0], normalize=True, truncate=True)
    np.testing.assert_allclose(vectors, plain.embed(TEXTS[:1]), atol=1e-6)
    cosines = InferenceClient(model=f"{server}/similarity").sentence_similarity(TEXTS[0], TEXTS[1:])
    np.testing.assert_allclose(cosines, plain.similarity(TEXTS[:1], TEXTS[1:])[0], atol=1e-6)


def test_client_of_openai_gets_vectors(served: Running, runs: Path) -> None:
    """It asks for base64 where no form is named, and answers with numbers either way."""
    vectors = lorakit.load(runs / "search").embed(TEXTS)
    client = OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="-", max_retries=0)
    for options in ({}, {"encoding_format": "float"}):
        answered = client.embeddings.create(model="search", input=TEXTS, **options)
        assert (answered.object, answered.model) == ("list", "search")
        assert answered.usage.prompt_tokens == answered.usage.total_tokens > len(TEXTS)
        assert [entry.index for entry in answered.data] == [0, 1, 2, 3]
        np.testing.assert_allclose([entry.embedding for entry in answered.data], vectors, atol=1e-6)
    (short,) = client.embeddings.create(model="search", input=TEXTS[0], dimensions=8).data
    np.testing.assert_allclose(short.embedding, lorakit.load(runs / "search").embed(TEXTS[:1], dims=8)[0], atol=1e-6)
    with pytest.raises(NotFoundError, match="did you mean 'search'"):
        client.embeddings.create(model="serach", input="a")


REFUSED: dict[str, tuple[str, Any, int, str]] = {
    "a classifier": ("/embed", {"inputs": "a", "adapter": "classifier"}, 422, "never gives vectors"),
    "no text": ("/embed", {"inputs": []}, 400, "cannot be empty"),
    "an empty text": ("/rerank", {"query": "a", "texts": [" "]}, 400, "cannot be empty"),
    "too many": ("/rerank", {"query": "a", "texts": ["b"] * 5}, 413, "batch size 5"),
    "dimensions": ("/embed", {"inputs": "a", "dimensions": 17}, 422, "`dimensions`: dims = 17"),
    "token ids": ("/v1/embeddings", {"input": [1, 2]}, 422, "`input"),
    "another key": ("/similarity", {"inputs": {"source_sentence": "a"}}, 422, "sentences"),
    "labels": ("/predict", {"inputs": "a", "adapter": "plain"}, 422, "use /embed"),
    "long": ("/embed", {"inputs": "superb " * 30}, 413, "less than 12 tokens"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_requests_that_cannot_be_answered_are_refused(what: str, served: Running) -> None:
    path, body, status, message = REFUSED[what]
    answered = served.ask(path, body)
    key = "message" if path.startswith("/v1/") else "error"
    assert answered.status == status and message in answered.json[key], answered.body


def test_report_shows_what_is_near_what(runs: Path) -> None:
    """The oracle: cosines of `embed`, for pairs and for texts with classes."""
    for name, texts in (("search", 2), ("plain", 1)):
        run = read_run(runs / name)
        assert run.vectors is not None and run.vectors.shape == (len(run.predictions), texts, 16)
        near = Similarities.of(run)
        assert near is not None
        model = lorakit.load(runs / name)
        firsts = [p.text for p in run.predictions]
        seconds = [str(p.pair) for p in run.predictions] if texts == 2 else firsts
        np.testing.assert_allclose(near.cosines, model.similarity(firsts, seconds), atol=2e-3)
        assert [chart.name for chart in near.charts()] == ["similarities", "map"]
        page = html(content_of(run))
        assert 'id="nearest"' in page and ('id="worst-pairs"' in page) == bool(near.worst()[1])
        assert "Worst mistakes" not in page
        row = near.neighbours()[0]
        cosines = near.cosines[0] - 3 * (texts == 1) * np.eye(len(firsts))[0]
        assert row[1] == f"{cosines.max():.2f} {seconds[cosines.argmax()]}"


def test_worst_pairs_come_first() -> None:
    """Of pairs the one with most texts before its own; of scored pairs the one that is furthest from its place."""
    angles = {"a": 0.0, "b": 1.0, "c": 2.0, "A": 0.1, "B": -0.2, "C": 2.1}
    at = {name: (np.cos(angle), np.sin(angle)) for name, angle in angles.items()}
    pairs = [Prediction(text=text, pair=text.upper(), expected=1.0) for text in "abc"]
    vectors = np.array([[at[p.text], at[str(p.pair)]] for p in pairs])
    columns, rows = Similarities(pairs, vectors, False).worst()
    assert (columns[3], rows[0][:2], rows[0][3:5]) == ("place", ("b", "B"), ("3", "A"))
    scored = [p.model_copy(update={"expected": score}) for p, score in zip(pairs, (1.0, 3.0, 2.0), strict=True)]
    _, rows = Similarities(scored, vectors, True).worst()
    assert rows[0][:3] == ("b", "B", "3")
    (chart, _) = Similarities(scored, vectors, True).charts()
    assert chart.title == "Similarity against score" and "<svg" in chart.svg


def test_damaged_vectors_are_refused(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "plain", tmp_path / "run")
    (tmp_path / "run" / "vectors.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(OutputError, match=r"vectors.npy: damaged"):
        read_run(tmp_path / "run")
    np.save(tmp_path / "run" / "vectors.npy", np.ones((3, 16), np.float16))
    with pytest.raises(OutputError, match=r"vectors.npy: damaged: not finite vectors"):
        read_run(tmp_path / "run")
