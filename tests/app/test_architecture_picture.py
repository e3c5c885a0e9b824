"""architecture.svg: drawn from the modules of any family, every trained parameter in it, equal blocks and tied matrices once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

import pytest
from torch import nn

from lorakit.app.report.architecture import Part, architecture, parts_of
from lorakit.lora import LoraConfig, add_adapter, count_parameters
from tests.interop.architectures import ARCHITECTURES
from tests.tiny import tiny

ATTENTION, FEED_FORWARD = ["query", "key", "value", "output"], ["up", "down"]
IN_BLOCK = {"self-attention": ATTENTION, "feed-forward": FEED_FORWARD}
FUSED = {"self-attention": ["query, key, value", "output"], "feed-forward": FEED_FORWARD}
# the groups of a block by family, in the words of a textbook
BLOCKS: dict[str, list[Mapping[str, list[str]]]] = {
    "BERT SEQ_CLS": [IN_BLOCK],
    "RoBERTa SEQ_CLS": [IN_BLOCK],
    "DistilBERT TOKEN_CLS": [IN_BLOCK],
    "DeBERTa-v2 SEQ_CLS": [IN_BLOCK],
    "ALBERT SEQ_CLS": [IN_BLOCK],
    "ModernBERT SEQ_CLS": [FUSED],
    "GPT-2 SEQ_CLS": [FUSED],
    "T5 SEQ_2_SEQ_LM": [IN_BLOCK, {"self-attention": ATTENTION, "cross-attention": ATTENTION, **IN_BLOCK}],
    "BART SEQ_2_SEQ_LM": [IN_BLOCK, {"self-attention": ATTENTION, "cross-attention": ATTENTION, **IN_BLOCK}],
}


def texts(svg: str) -> list[str]:
    """The lines of a picture, its signs of multiplication as letters."""
    elements = ElementTree.fromstring(svg.replace("\N{MULTIPLICATION SIGN}", "x")).iter(
        "{http://www.w3.org/2000/svg}text"
    )
    return ["".join(element.itertext()).strip() for element in elements]


def drawn_as_trained(parts: list[Part]) -> int:
    return sum(
        box.trained * box.copies * (len(part.numbers) or 1)
        for part in parts
        for boxes in part.groups.values()
        for box in boxes
    )


@pytest.mark.parametrize("name", BLOCKS)
def test_block_of_each_family_is_read_from_its_modules(name: str) -> None:
    model, head = ARCHITECTURES[name].build(), ARCHITECTURES[name].head
    config = LoraConfig(r=4, use_dora="RoBERTa" in name, modules_to_save=head)
    add_adapter(model, config, "mine")
    parts = parts_of(model, "mine")
    blocks = [part for part in parts if part.numbers]
    assert [{group: [b.title for b in boxes] for group, boxes in part.groups.items()} for part in blocks] == BLOCKS[
        name
    ]
    assert drawn_as_trained(parts) == count_parameters(model, "mine").trainable
    assert [part.kind for part in parts][: len(blocks) + 1] == ["embeddings", "encoder", "decoder"][: len(blocks) + 1]
    shown = texts(architecture(model, name, "mine", config))
    assert any(text.startswith(f"{count_parameters(model, 'mine').trainable:,} of ") for text in shown)
    assert "x alpha / r = 16 / 4 = 4" in shown


@pytest.mark.parametrize(
    ("settings", "numbers", "updates"),
    [
        ({}, [[0, 1, 2]], ["r 4 +256"]),
        ({"layers_to_transform": (0, 2)}, [[0, 2], [1]], ["r 4 +256", ""]),
        ({"rank_pattern": {"layer.1.attention.self.query": 2}}, [[0, 1, 2]], ["r 2 to 4"]),
    ],
    ids=["all", "some layers", "a rank of its own"],
)
def test_blocks_that_differ_in_ranks_alone_stand_there_once(
    settings: dict[str, Any], numbers: list[list[int]], updates: list[str]
) -> None:
    model = tiny("BertForSequenceClassification", num_labels=3)
    add_adapter(model, LoraConfig(r=4, target_modules=("query",), **settings), "default")
    blocks = [part for part in parts_of(model, "default") if part.numbers]
    assert [part.numbers for part in blocks] == numbers
    assert [part.groups["self-attention"][0].update for part in blocks] == updates


def test_tied_matrix_is_drawn_once() -> None:
    model = tiny("T5ForConditionalGeneration")
    names = [box.name for part in parts_of(model, "default") for boxes in part.groups.values() for box in boxes]
    assert names.count("shared") == 1 and not {"lm_head", "embed_tokens"} & {*names}
    assert any("tied" in text for text in texts(architecture(model, "T5")))


@pytest.mark.parametrize("method", ["full", "head"])
def test_without_an_adapter_what_is_trained_is_coloured(method: str) -> None:
    model: nn.Module = tiny("BertForSequenceClassification", num_labels=3)
    model.requires_grad_(method == "full")
    model.get_submodule("classifier").requires_grad_(True)
    parts = parts_of(model, "default")
    kinds = {box.kind for part in parts for boxes in part.groups.values() for box in boxes}
    assert kinds == ({"trained"} if method == "full" else {"trained", "frozen"})
    assert "adapted layer" not in architecture(model, "BERT")


def test_inset_has_the_numbers_of_its_layer() -> None:
    model, config = tiny("BertForSequenceClassification", num_labels=3), LoraConfig(r=4, use_dora=True, use_rslora=True)
    add_adapter(model, config, "default")
    shown = texts(architecture(model, "BERT", "default", config, wide=True))
    assert {"32 x 32", "4 x 32", "32 x 4", "1,024, frozen", "x alpha / √r = 16 / √4 = 8"} <= {*shown}
    assert "288 trained beside 1,024 frozen (28.1 %)" in shown  # A and B 256, magnitude 32
    assert "also trained: magnitude m, 32" in shown


def test_name_of_a_model_is_text() -> None:
    model = tiny("BertForSequenceClassification", num_labels=3)
    hostile = "</title><script>alert(1)</script>\x00‮" + "x" * 500
    root = ElementTree.fromstring(architecture(model, hostile))
    assert not [e for e in root.iter() if e.tag.endswith("script")]
