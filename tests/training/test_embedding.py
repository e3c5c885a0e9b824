"""Runs of embedding models: their data, batches, gradient in pieces, scores. The oracle of vectors: sentence-transformers."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from torch import Tensor

from lorakit.data.batches import paired_batches
from lorakit.data.example import Columns, Example
from lorakit.data.read import read
from lorakit.errors import ConfigError, DataError, ModelError
from lorakit.inference.answer import Answered, answer_all
from lorakit.lora import routed
from lorakit.models import load_base
from lorakit.pooling import own_layout
from lorakit.runtime.device import random_state, set_random_state
from lorakit.runtime.distributed import Ranks
from lorakit.runtime.events import Event, Note
from lorakit.tasks.base import inputs_of
from lorakit.tasks.embedding import Embedding, number_of
from lorakit.training.loop import train
from lorakit.training.prepare import Prepared, prepare
from lorakit.training.run import member_of
from tests.related import laid_out, recipe, save_table
from tests.runs import changed, fit, taken_up

TEXTS = ["the film was superb", "a rather stale plot and a clumsy cast", "moving", "ada visited oslo in spring ."]


def vectors_of(prepared: Prepared, texts: Sequence[str]) -> Any:
    examples = [Example(text) for text in texts]
    with routed(prepared.model, [(prepared.adapter, 0)]):
        answers = answer_all(prepared.model, prepared.task, examples, prepared.task.encode(examples), prepared.device)
    return np.concatenate(answers)


@pytest.mark.parametrize(("normalize", "pooling"), [(True, "mean"), (False, "mean"), (True, "cls")])
def test_vectors_before_the_first_step_are_those_of_sentence_transformers(
    normalize: bool, pooling: str, tables: Path, sentence_bert: Path, tmp_path: Path
) -> None:
    prompts = {"query": "the film", "document": "a plot "}
    base = laid_out(tmp_path / "base", sentence_bert, normalize, prompts)
    (base / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 16, f"pooling_mode_{pooling}_token{'s' * (pooling == 'mean')}": True})
    )
    prepared = prepare(recipe(base, tables / "pairs.csv"))
    section = prepared.recipe.task
    assert (section.normalize, prepared.recipe.model.pooling) == (normalize, pooling)
    assert (section.query_prompt, section.document_prompt) == ("the film", "a plot ")
    long = " ".join(["superb"] * 30)  # longer than the limit that the base says
    oracle = SentenceTransformer(str(base), device="cpu").encode([*TEXTS, long], prompt_name="document")
    np.testing.assert_allclose(vectors_of(prepared, [*TEXTS, long]), oracle, atol=1e-6)


DIMS = ("task.dims=[8]",)


@pytest.mark.parametrize(
    ("form", "words", "micro"),
    [
        ("pairs", (), 1),
        ("scores", DIMS, 3),
        ("classes", (), 3),
        ("repeats", ("task.symmetric=true",), 3),
    ],
)
def test_gradient_in_pieces_is_that_of_the_whole_batch_with_dropout(
    form: str, words: Sequence[str], micro: int, tables: Path, encoder: Path, tmp_path: Path
) -> None:
    """One step in pieces of any size, against one forward a piece whose graphs are all kept."""
    words = ("model.dropout=0.2", "lora.dropout=0.1", "train.max_steps=1", f"train.micro_batch_size={micro}", *words)
    data = tables / f"{form}.csv"
    if form == "repeats":  # of anchors and of positives in every batch: what is masked in pieces is so in the whole
        pairs = [(f"a {t}", f"the {f} {t}") for t in ("film", "plot") for f in ("superb", "stale")] * 4
        data = save_table(tmp_path / "pairs.csv", ["anchor", "positive"], pairs)
    prepared = prepare(recipe(encoder, data, *words))
    member, model = member_of(prepared), prepared.model
    items = prepared.parts["train"].drawn(prepared.task.info)
    rows = [item for i in next(iter(member.plan.batches(0))) for item in items[i]]
    batch = prepared.task.collate(rows)
    n, pieces = batch.pop("n_targets").sum(), -(-8 // micro)
    set_random_state(member.random_state, torch.device("cpu"))
    model.train()
    lengths = batch["attention_mask"].sum(1)
    order, vectors = lengths.argsort(), []
    with routed(model, [(member.adapter, 0)]):
        for some in order.tensor_split(pieces):
            longest = int(lengths[some].max())
            vectors.append(model(**{key: value[some, :longest] for key, value in inputs_of(batch).items()}).logits)
    loss = prepared.task.losses(Answered(torch.cat(vectors)[order.argsort()], {}), batch).sum() / n
    expected = torch.autograd.grad(loss, member.parameters)
    after = random_state(torch.device("cpu"))
    found = gradients_of(member.optimizer)
    member.plan.config.__dict__["max_grad_norm"] = 1e9
    (step,) = next(train(model, [member])).values()
    assert step.loss == pytest.approx(float(loss.detach()), abs=1e-6)
    torch.testing.assert_close(found, list(expected), rtol=1e-5, atol=1e-6)
    assert torch.equal(member.random_state["cpu"], after["cpu"])


def gradients_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Filled by the next step with the gradient of each of its parameters."""
    found: list[Tensor] = []

    def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        found.extend(p.grad.clone() for group in optimizer.param_groups for p in group["params"])

    optimizer.register_step_pre_hook(before)
    return found


@pytest.mark.parametrize(
    ("form", "words", "metric"),
    [
        ("pairs", (), "ndcg_at_10"),
        ("pairs", ("task.loss=triplet", "task.metric=map"), "map"),
        ("scores", ("task.dims=[8,4]",), "spearman"),
        ("classes", (), "ndcg_at_10"),
    ],
)
def test_each_form_of_data_is_learned_and_the_untouched_base_is_scored_first(
    form: str, words: Sequence[str], metric: str, tables: Path, encoder: Path, tmp_path: Path
) -> None:
    result = fit(recipe(encoder, tables / f"{form}.csv", *words), tmp_path / "run")
    scores = result.scores
    assert scores["metric"] == metric
    low, high = scores["intervals"][metric]
    assert low <= scores[metric] <= high
    assert scores[metric] > scores["base_score"] + 0.02
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0 and first["validation"][metric] == scores["base_score"]
    assert "loss" not in first["validation"]
    line = json.loads((tmp_path / "run" / "predictions.jsonl").read_text().splitlines()[0])
    assert line.keys() == ({"text", "expected"} if form == "classes" else {"text", "pair", "score", "expected"})
    again = result.predictor.evaluate(result.predictor.read_labelled(str(tables / f"{form}.csv")).examples)
    assert again[metric] == pytest.approx(scores[metric], abs=1e-6)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory, tables: Path) -> Path:
    """Pairs with a negative and a teacher's scores of both, in a column of a usual name."""
    rows = list(csv.DictReader((tables / "pairs.csv").read_text().splitlines()))
    path = tmp_path_factory.mktemp("taught") / "pairs.csv"
    return save_table(
        path, [*rows[0], "score"], [[*row.values(), f"[{i % 4 + 4}, -1.5]"] for i, row in enumerate(rows)]
    )


@pytest.mark.parametrize("loss", ["", "task.loss=kl"])
def test_a_teachers_scores_are_learned(loss: str, taught: Path, encoder: Path, tmp_path: Path) -> None:
    run = fit(recipe(encoder, taught, "task.temperature=0.2", *filter(None, [loss])), tmp_path / "run")
    assert run.predictor.side.task.loss == (loss.partition("=")[2] or "margin_mse")
    assert run.scores["ndcg_at_10"] > run.scores["base_score"] + 0.02
    examples = read(str(taught), "related", columns=Columns(pair="positive")).examples
    assert [e.teacher for e in examples[:2]] == [(4.0, -1.5), (5.0, -1.5)] and examples[0].label is None
    task = prepare(recipe(encoder, taught)).task
    assert [item["labels"] for item in task.encode(examples[:1])[0]] == [[4.0], [4.0], [-1.5]]


def test_a_teachers_scores_are_one_for_each_text(taught: Path, tables: Path, encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(taught.read_text().replace("[4, -1.5]", "[4, 1, 2]"))
    with pytest.raises(DataError, match=r"a.csv:2, 6, .*: column 'score' holds 3 scores; there are 2 texts to score"):
        read(str(tmp_path / "a.csv"), "related", columns=Columns(pair="positive"))
    with pytest.raises(DataError, match=r"pairs.csv:2: no teacher's scores, which task.loss = 'kl' needs: data.label"):
        prepare(recipe(encoder, tables / "pairs.csv", "task.loss=kl"))
    reranker = {**recipe(encoder, taught).model_dump(exclude_unset=True), "task": {"name": "reranker"}}
    with pytest.raises(DataError, match=r"pairs.csv:2: the score 4 is not from 0 to 1, as task.loss = 'bce' learns it"):
        prepare(changed(reranker))
    prepared = prepare(changed(reranker, "task.loss=margin_mse"))
    assert [item["labels"] for item in prepared.parts["train"].items[0]] == [[4.0], [-1.5]]


def test_texts_of_an_example_are_counted_one_by_one_and_are_no_windows(encoder: Path, tmp_path: Path) -> None:
    pairs = [(f"the film was {i}", "superb " * (30 if i == 3 else 2)) for i in range(10)]
    events: list[Event] = []
    data = save_table(tmp_path / "pairs.csv", ["anchor", "positive"], pairs)
    prepare(recipe(encoder, data, "data.max_length=12"), events.append)
    about_train = [event.text for event in events if isinstance(event, Note) and event.text.startswith("train: ")]
    assert about_train == ["train: cut at 12 tokens: 1 texts, of 20 texts (5.0%)"]


@pytest.mark.parametrize("form", ["pairs", "classes"])
def test_scores_of_a_search_are_those_of_sentence_transformers(form: str, tables: Path, encoder: Path) -> None:
    prepared = prepare(recipe(encoder, tables / f"{form}.csv", "task.normalize=false"))
    examples = prepared.parts["train"].examples
    with routed(prepared.model, [(prepared.adapter, 0)]):
        arguments = (prepared.model, prepared.task, examples, prepared.parts["train"].items, prepared.device)
        found = prepared.task.evaluate(examples, answer_all(*arguments)).scores
    oracle = SentenceTransformer(str(encoder), device="cpu")
    if form == "pairs":
        texts = list(dict.fromkeys(text for e in examples for text in (str(e.pair), *e.negatives)))
        queries = {e.text: {e.pair} for e in examples}
        expected = searched(oracle, queries, texts)
    else:  # each text among the others, so that one search a text
        texts = [e.text for e in examples]
        classes = {e.text: str(e.label) for e in examples}
        each = [
            searched(oracle, {q: {t for t in texts if classes[t] == classes[q]} - {q}}, [t for t in texts if t != q])
            for q in texts
        ]
        expected = {name: sum(scores[name] for scores in each) / len(each) for name in each[0]}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6)


def searched(model: Any, relevant: dict[str, Any], texts: Sequence[Any]) -> dict[str, float]:
    evaluator = InformationRetrievalEvaluator(
        {text: text for text in relevant},
        {text: text for text in texts},
        relevant,
        mrr_at_k=[10],
        ndcg_at_k=[10],
        precision_recall_at_k=[10],
        map_at_k=[len(texts)],
        write_csv=False,
    )
    scores = evaluator(model)
    names = {"ndcg_at_10": "ndcg@10", "mrr_at_10": "mrr@10", "recall_at_10": "recall@10", "map": f"map@{len(texts)}"}
    return {name: float(scores[f"cosine_{theirs}"]) for name, theirs in names.items()}


def test_texts_of_a_class_are_drawn_in_pairs() -> None:
    classes = [0] * 7 + [1] * 4 + [2] * 3 + [3]  # two classes leave one over
    lengths = [3 + i % 5 for i in range(len(classes))]
    epochs = [paired_batches(lengths, classes, 4, 0, epoch) for epoch in (0, 1)]
    for batches in epochs:
        assert sorted(i for batch in batches for i in batch) == list(range(15))
        assert sorted(map(len, batches)) == [3, 4, 4, 4]
        alone = [i for batch in batches for i in batch if Counter(classes[j] for j in batch)[classes[i]] == 1]
        assert len(alone) <= 3
    assert epochs[0] != epochs[1]


def test_a_text_that_stands_twice_has_one_number_and_its_own_role(encoder: Path) -> None:
    base = load_base(str(encoder), "embedding", pooling="auto")
    section = changed({"model": {"base": "x"}, "task": {"name": "embedding", "query_prompt": "a "}}).task
    task = Embedding(base.tokenizer, base.max_length, section)
    ((anchor, positive, negative),) = task.encode([Example("the film", pair="the film", negatives=("a plot",))])
    assert [item["role"] for item in (anchor, positive, negative)] == [[0], [1], [2]]
    assert anchor["text"] == positive["text"] == [number_of("the film")] != negative["text"]
    assert len(anchor["input_ids"]) == len(positive["input_ids"]) + 1


@pytest.mark.parametrize(
    ("form", "words", "message"),
    [
        ("classes", ("task.loss=cosent",), r"task.loss = 'cosent' does not work with texts with their classes"),
        ("scores", ("task.loss=cosine_mse",), r"scores.csv:3: the score 4.5 is not a cosine"),
        ("scores", ("task.metric=map",), r"task.metric = 'map' is not a score of pairs of texts with scores"),
        ("classes", ("task.query_prompt=q", "task.document_prompt=d"), r"task.document_prompt = 'd': texts with"),
        ("pairs", ("data.negative=wrong",), r"data.negative = 'wrong' is not a column"),
        ("classes", ("data.negative=label",), r"data.negative needs pairs; set the second text"),
        ("classes", ("data.label=[text,label]",), r"data.label names several columns"),
    ],
)
def test_what_does_not_go_together_is_refused(
    form: str, words: Sequence[str], message: str, tables: Path, encoder: Path
) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        prepare(recipe(encoder, tables / f"{form}.csv", *words))


def test_settings_that_a_recipe_alone_shows_are_refused(encoder: Path, tables: Path) -> None:
    for words, message in {
        ("task.loss=cosnet",): r"task.loss = 'cosnet': did you mean 'cosent'",
        ("train.shard_base=true",): r"train.shard_base = true: the shares of a batch cannot be compared",
        ("task.name=sequence_regression", "task.loss=cosent"): r"task.loss = 'cosent' belongs to embedding",
    }.items():
        with pytest.raises(ConfigError, match=message):
            recipe(encoder, tables / "pairs.csv", *words)
    with pytest.raises(ConfigError, match=r"data.folds = 3: the answers of several models cannot be compared"):
        changed({"model": {"base": "x"}, "task": {"name": "embedding"}, "data": {"train": "x"}}, "data.folds=3")


def test_several_processes_are_refused(encoder: Path, tables: Path) -> None:
    with pytest.raises(ConfigError, match=r"trains in one process, not in 2; use train.micro_batch_size for"):
        prepare(recipe(encoder, tables / "pairs.csv"), ranks=Ranks(0, 2))


def test_data_without_what_belongs_together_are_refused(tmp_path: Path) -> None:
    path = save_table(tmp_path / "a.csv", ["text", "other"], [("a film", "x"), ("a plot", "y")])
    with pytest.raises(DataError, match=r"which texts belong together\? .*data.pair=NAME.*data.label=NAME"):
        read(str(path), "related")
    found = read(str(path), "related", columns=Columns(pair="other"))
    assert [(e.text, e.pair, e.label, e.negatives) for e in found.examples] == [
        ("a film", "x", None, ()),
        ("a plot", "y", None, ()),
    ]


def test_negatives_are_columns_or_a_list_and_may_be_missing(tmp_path: Path) -> None:
    rows = [
        {"query": "a", "positive": "b", "negatives": ["c", "d"], "label": "about"},
        {"query": "e", "positive": "f", "negatives": None, "label": "about"},
        {"query": "g", "positive": "h", "negatives": "i", "label": "about"},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = read(str(path), "related", columns=Columns(pair="positive"))
    assert [(e.negatives, e.label) for e in dataset.examples] == [(("c", "d"), None), ((), None), (("i",), None)]
    assert any("negatives are column 'negatives'" in note for note in dataset.notes)
    path.write_text(path.read_text().replace('"i"', "7"))
    with pytest.raises(DataError, match=r"a.jsonl:3: column 'negatives' holds 7, not a text"):
        read(str(path), "related", columns=Columns(pair="positive"))


def test_a_base_that_makes_vectors_in_another_way_is_refused(encoder: Path, t5: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(encoder, base)
    modules = json.loads((base / "modules.json").read_text())
    (base / "modules.json").write_text(json.dumps([*modules, {"type": "sentence_transformers.models.Dense"}]))
    with pytest.raises(ModelError, match=r"makes vectors by a module Dense"):
        load_base(str(base), "embedding", pooling="auto")
    (base / "modules.json").write_text("{")
    with pytest.raises(ModelError, match=r"modules.json: damaged"):
        own_layout(base, "x")
    (base / "modules.json").unlink()
    (base / "1_Pooling" / "config.json").write_text('{"pooling_mode": "max"}')
    with pytest.raises(ModelError, match=r"by max \(1_Pooling\), but lorakit has only 'mean' and 'cls'"):
        load_base(str(base), "embedding", pooling="auto")
    assert load_base(str(base), "embedding", pooling="cls").pooling == "cls"
    with pytest.raises(ModelError, match=r"an encoder with a decoder; embeddings need an encoder"):
        load_base(str(t5), "embedding", pooling="auto")


def test_a_resumed_run_keeps_what_was_chosen(tables: Path, encoder: Path, tmp_path: Path) -> None:
    words = recipe(encoder, tables / "pairs.csv", "train.eval_every=2")
    whole = fit(words, tmp_path / "whole")
    again = taken_up(words, tmp_path / "cut", 5).fit()
    for name in ("ndcg_at_10", "base_score", "best_step"):
        assert again.scores[name] == whole.scores[name]
