"""Models of many families answer as transformers lets them answer, whatever stands beside a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.data.example import Example
from lorakit.errors import ModelError
from lorakit.inference.predictor import load
from lorakit.lora.speedups import LIKE_BERT, read_first_row
from lorakit.models import BaseModel, depends_on_batch, has_dropout, load_base, load_tokenizer
from lorakit.recipe import TaskSection
from lorakit.tasks.base import pad_inputs
from lorakit.tasks.registry import make_task
from lorakit.tasks.text2text.decoding import Decoder
from lorakit.training.prepare import prepare
from tests.interop.families import OWN, cells, run_family, save_family, tokenizer
from tests.runs import changed, fit, sections, write_choices, write_entities, write_reviews

CLASSIFICATION, TAGGING = "sequence_classification", "token_classification"
SHORT, LONG = "the film was stale", "the last scene and the cast was rather lovely and the plot was fresh"


def base_of(
    folder: Path, family: str, kind: str = CLASSIFICATION, *, dropout: float | None = None, **how: Any
) -> BaseModel:
    auto = "AutoModelForSeq2SeqLM" if kind == "text2text" else "AutoModel"
    return load_base(str(save_family(folder, family, auto, **how)), kind, labels=("a", "b"), dropout=dropout)


@torch.no_grad()
def logits_of(base: BaseModel, *texts: str) -> Tensor:
    items = [{"input_ids": base.tokenizer(text)["input_ids"]} for text in texts]
    logits: Tensor = base.model(**pad_inputs(items, base.tokenizer)).logits
    return logits


# Padding


@pytest.mark.parametrize(
    ("family", "how"),
    [
        ("gpt2", {"pad": None, "pad_token_id": None}),  # neither has one
        ("qwen2", {"pad_token_id": None}),  # the tokenizer alone has one
        ("llama", {"pad_token_id": 7}),  # another one
        ("xlnet", {"summary_type": "last"}),  # the head reads the last position
    ],
)
def test_heads_that_look_for_the_last_token_find_it_in_any_batch(
    tmp_path: Path, family: str, how: dict[str, Any]
) -> None:
    base = base_of(tmp_path / "base", family, **how)
    assert base.model.config.pad_token_id == base.tokenizer.pad_token_id  # type: ignore[union-attr]
    torch.testing.assert_close(logits_of(base, SHORT, LONG)[0], logits_of(base, SHORT)[0], rtol=1e-4, atol=1e-5)
    assert not depends_on_batch(base.model)


def test_base_without_padding_and_end_token_is_refused(tmp_path: Path) -> None:
    save_family(tmp_path, "gpt2", pad=None)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token": None}))
    with pytest.raises(ModelError, match="neither a padding nor an end token"):
        load_base(str(tmp_path), CLASSIFICATION)


@pytest.mark.parametrize(
    ("family", "depends"), [("fnet", True), ("nystromformer", True), ("yoso", True), ("bert", False)]
)
def test_bases_whose_answers_depend_on_padding_are_told_apart(tmp_path: Path, family: str, depends: bool) -> None:
    """FNet has no mask at all, the convolutions of Nystromformer reach beyond it."""
    assert depends_on_batch(base_of(tmp_path, family).model) == depends


def test_answers_that_depend_on_padding_are_given_without_it(tmp_path: Path, files: Path) -> None:
    notes: list[Any] = []
    save_family(tmp_path / "base", "fnet")
    recipe = changed(sections(tmp_path / "base", files), "train.epochs=1")
    prepare(recipe, notes.append)
    assert any("depend on padding" in str(note) for note in notes)
    fit(recipe, tmp_path / "run")
    predictor = load(tmp_path / "run")
    alone, beside = predictor.predict([SHORT]), predictor.predict([LONG, SHORT, LONG + " and stale"])
    assert alone[0]["probabilities"] == pytest.approx(beside[1]["probabilities"], rel=1e-5)


@pytest.mark.parametrize(
    ("family", "kind", "message"),
    [
        ("switch_transformers", "text2text", "expert_capacity"),
        ("nllb-moe", "text2text", "expert_capacity"),
        ("prophetnet", "text2text", "other logits token by token"),  # its decoder sees tokens to come
        ("fsmt", "text2text", "other logits token by token"),  # so does its own, where the encoder has read before
        (
            "canine",
            CLASSIFICATION,
            "CanineForSequenceClassification cannot read 'a' beside",
        ),  # less than four characters
        ("reformer", CLASSIFICATION, "cannot read 'a' beside .* multiple of"),  # in training
    ],
)
def test_base_that_cannot_read_a_text_or_reads_it_by_its_neighbours_is_refused(
    tmp_path: Path, family: str, kind: str, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        base_of(tmp_path, family, kind, **OWN.get(family, {}))


# Length


@pytest.mark.parametrize(
    ("family", "longest"),
    [
        *((name, 63) for name in ("roberta", "camembert", "xlm-roberta-xl", "roberta-prelayernorm", "data2vec-text")),
        *((name, 63) for name in ("longformer", "ibert", "esm")),
        ("mpnet", 62),  # its table's padding row is the second one, whatever the config says
        *((name, 64) for name in ("bert", "bart", "opt", "nystromformer", "gpt2")),
        ("xlnet", 512),  # no limit but ours
    ],
)
def test_longest_text_is_all_that_the_positions_take(tmp_path: Path, family: str, longest: int) -> None:
    own = {"vocab_size": len(tokenizer()), "position_embedding_type": "absolute"} if family == "esm" else {}
    base = base_of(tmp_path, family, **own)
    kind = CLASSIFICATION
    assert (base.max_length, load_tokenizer(str(tmp_path), kind)[1]) == (longest, longest)
    ids = [1, *[5] * (longest - 2), 2]
    with torch.no_grad():
        logits = base.model(**pad_inputs([{"input_ids": ids}, {"input_ids": ids[-3:]}], base.tokenizer)).logits
    assert logits.isfinite().all()


# Dropout


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *(("albert", kind) for kind in (CLASSIFICATION, TAGGING)),  # classifier_dropout_prob
        *((family, TAGGING) for family in ("gpt2", "qwen2", "mpt")),  # None in the config, 0.1 in the head
        *((family, CLASSIFICATION) for family in ("bart", "xlnet", "deberta-v2", "t5")),
    ],
)
def test_no_dropout_is_none(tmp_path: Path, family: str, kind: str) -> None:
    own = {"encoder_layerdrop": 0.5} if family == "bart" else {}
    before = base_of(tmp_path, family, kind, **own)
    assert before.drops
    assert has_dropout(before.model)
    base = load_base(str(tmp_path), kind, labels=("a", "b"), dropout=0.0)
    assert not base.drops
    base.model.train()
    assert [path for path, module in base.model.named_modules() if getattr(module, "p", 0)] == []
    assert torch.equal(logits_of(base, SHORT), logits_of(base, SHORT))
    rates = {m.p for m in load_base(str(tmp_path), kind, dropout=0.25).model.modules() if isinstance(m, nn.Dropout)}
    assert rates in ({0.25}, set())


# What is trained in full


@pytest.mark.parametrize("family", ["bart", "marian", "t5", "led"])
def test_output_layer_of_a_model_that_writes_is_part_of_the_base(tmp_path: Path, family: str) -> None:
    assert base_of(tmp_path, family, "text2text").saved_modules == ()


@pytest.mark.parametrize(("family", "lacking"), [("bart", ()), ("pegasus", ())])
def test_output_layer_that_the_checkpoint_lacks_is_trained(
    tmp_path: Path, family: str, lacking: tuple[str, ...]
) -> None:
    save_family(tmp_path, family, tie_word_embeddings=not lacking)
    assert load_base(str(tmp_path), "text2text").saved_modules == lacking


@pytest.mark.parametrize(
    ("family", "kind", "reads"),
    [
        ("bert", CLASSIFICATION, True),
        ("bert", TAGGING, True),
        ("t5gemma", CLASSIFICATION, False),
        ("gpt2", TAGGING, True),
    ],
)
def test_output_layer_that_gives_logits_of_every_token_is_no_start_for_a_probe(
    tmp_path: Path, family: str, kind: str, reads: bool
) -> None:
    assert (base_of(tmp_path, family, kind, **OWN.get(family, {})).new_head() is not None) == reads


# End tokens


@pytest.mark.parametrize("family", ["bart", "t5", "mbart", "umt5"])
def test_end_token_that_a_text_spells_is_text(tmp_path: Path, family: str) -> None:
    base = base_of(tmp_path, family)
    for text in (SHORT, f"{SHORT} </s>", f"the</s>film </s></s> {SHORT}"):
        assert base.tokenizer(text)["input_ids"].count(2) == 1
    assert base.tokenizer(SHORT)["input_ids"] == tokenizer()(SHORT)["input_ids"]  # ordinary texts stay as they were
    spelt = f"the </s> film {LONG}"
    torch.testing.assert_close(logits_of(base, spelt, SHORT)[0], logits_of(base, spelt)[0], rtol=1e-4, atol=1e-5)


# Decoding


@pytest.mark.parametrize("family", ["blenderbot", "m2m_100", "mbart", "t5"])
def test_decoder_reads_in_training_what_it_reads_in_prediction(tmp_path: Path, family: str) -> None:
    """The loss of a label is what the decoder's log-probabilities, token by token from its start, add up to."""
    base = base_of(tmp_path, family, "text2text", **OWN.get(family, {}))
    task = make_task(TaskSection(name="text2text_classification"), base.tokenizer, ("bad", "good"), 64)
    batch = task.collate([items[0] for items in task.encode([Example(SHORT, "good"), Example(LONG, "bad")])])
    model = base.model.eval()
    with torch.no_grad():
        losses, decoder = task.losses(model, batch), Decoder(model, batch)
        for row, label in enumerate(batch["labels"].tolist()):
            last, log_p = [decoder.start], 0.0
            for token in label:
                log_p += float(decoder.after(last[1:], range(len(base.tokenizer)))[row, token])
                last.append(token)
            assert float(losses[row]) == pytest.approx(-log_p, rel=1e-4)


@pytest.mark.parametrize(
    ("family", "tie"), [("t5", True), ("t5", False), ("umt5", False), ("longt5", True), ("bart", True), ("bart", False)]
)
@torch.no_grad()
def test_decoder_gives_the_logits_of_the_model(tmp_path: Path, family: str, tie: bool) -> None:
    """Step by step behind kept keys and values, and at once; with some rows of the output layer and with all."""
    own = {"feed_forward_proj": "gated-gelu"} if family != "bart" else {}
    base = base_of(tmp_path, family, "text2text", tie_word_embeddings=tie, **own)
    model: Any = base.model.eval()
    batch = pad_inputs([{"input_ids": base.tokenizer(text)["input_ids"]} for text in (SHORT, LONG)], base.tokenizer)
    written, rows = [9, 5, 30], torch.tensor([2, 5, 30, 41])
    whole = model(**batch, decoder_input_ids=torch.tensor([[Decoder(model, batch).start, *written]] * 2)).logits
    for some in (None, rows):
        wanted = whole if some is None else whole[..., some]
        decoder = Decoder(model, batch)
        for i, token in enumerate([decoder.start, *written]):
            step = decoder.logits(torch.tensor([[token]] * 2), some)
            torch.testing.assert_close(step, wanted[:, i], rtol=1e-4, atol=1e-5)
    after = Decoder(model, batch).after(written, rows.tolist())
    torch.testing.assert_close(after, whole[:, -1, rows].log_softmax(-1), rtol=1e-4, atol=1e-5)


# The last block's first token


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in ("deberta-v2", "roformer") else pytest.mark.slow)
        for name in sorted(LIKE_BERT)
    ],
)
def test_families_like_bert_need_of_the_last_block_one_token(tmp_path: Path, family: str) -> None:
    """Logits and gradients are those of the model as transformers has it."""
    found = []
    for is_fast in (False, True):
        base = base_of(tmp_path / str(is_fast), family, dropout=0.0, **OWN.get(family, {}))
        assert not is_fast or read_first_row(base.model)
        items = [{"input_ids": base.tokenizer(text)["input_ids"]} for text in (SHORT, LONG)]
        logits = base.model(**pad_inputs(items, base.tokenizer)).logits
        (logits * torch.tensor([1.0, -2.0])).sum().backward()
        named = base.model.named_parameters()
        found.append({"": logits.detach()} | {n: p.grad for n, p in named if p.grad is not None and p.grad.any()})
    assert found[0].keys() == found[1].keys()
    largest = max(float(value.abs().max()) for value in found[0].values())  # that of a key's bias is noise about 0
    for name, plain in found[0].items():
        torch.testing.assert_close(found[1][name], plain, rtol=1e-3, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize(("family", "reads"), [("roformer", "last"), ("convbert", "last"), ("electra", "first")])
def test_choices_are_judged_by_the_token_that_the_head_reads(tmp_path: Path, family: str, reads: str) -> None:
    base = base_of(tmp_path, family, "multiple_choice")
    before = logits_of(base, LONG)
    assert ("last block: first token only" in base.speed_up(torch.device("cpu"))) == (reads == "first")
    torch.testing.assert_close(logits_of(base, LONG), before, rtol=1e-4, atol=1e-5)


# The matrix


@pytest.fixture(scope="session")
def few_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of a cell's run: a dozen texts, and as many tagged sentences."""
    folder = tmp_path_factory.mktemp("few")
    for part, n in (("train", 12), ("validation", 4)):
        write_reviews(folder / f"{part}.csv", n)
        write_entities(folder / f"{part}.conll", n)
        write_choices(folder / f"{part}.choices.csv", n)
    return folder


QUICK = [
    ("roberta", "tagging"),
    ("umt5", "text2text"),
    ("xlnet", "classification"),
    ("ibert", "classification"),
    ("perceiver", "classification"),
]


@pytest.mark.parametrize(
    ("family", "kind"),
    [pytest.param(*cell, marks=() if cell in QUICK else pytest.mark.slow) for cell in cells()],
)
def test_cell_of_families_is_explained(
    family: str, kind: str, few_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (family, kind) in QUICK:
        monkeypatch.setattr("tests.interop.families.EXPORTED", ())
    outcomes = run_family(family, kind, few_files, tmp_path)
    assert {check: outcome for check, outcome in outcomes.items() if outcome.status == "FAIL"} == {}


def test_cell_without_an_explanation_fails(few_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.interop.families.KNOWN", ())
    outcomes = run_family("ibert", "tagging", few_files, tmp_path)
    assert {outcome.status for outcome in outcomes.values()} == {"FAIL"}
