"""A run over a quantised base, from the recipe to the answers of its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lorakit.app.commands.inspect import inspect_recipe, inspect_run
from lorakit.data.read import read
from lorakit.errors import AdapterError, ConfigError
from lorakit.inference.predictor import load
from lorakit.lora.quantization import FORMATS, QuantizedTensor
from lorakit.training.prepare import prepare
from tests.runs import Sections, changed, fit, read_lines, sections


@pytest.fixture
def raw(bert: Path, files: Path) -> Sections:
    return sections(bert, files)


def quantized(model: torch.nn.Module) -> dict[str, str]:
    """name -> format of each quantised weight."""
    return {name: p.format for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)}


@pytest.mark.parametrize(
    "words",
    [
        ("model.quantize=nf4", "model.dtype=bf16", "lora.use_dora=true"),
        ("model.quantize=nf4", "lora.init=loftq", "lora.target_modules=query"),
        ("model.quantize=int8", "train.method=head"),
    ],
    ids=["nf4 bf16 dora", "nf4 loftq", "int8 head"],
)
def test_answers_are_restored_from_the_folder_and_kept_by_merging(
    raw: Sections, files: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    fit(changed(raw, *words, "train.max_steps=6"), run)
    examples = read(str(files / "validation.csv")).examples
    loaded = load(run / "adapter")
    format = words[0].partition("=")[2]
    assert set(quantized(loaded.model).values()) == {format}
    assert format in "\n".join(inspect_run(run).lines)
    answers = [loaded.task.to_json(e, a) for e, a in zip(examples, loaded.answers(examples), strict=True)]
    lines = read_lines(run / "predictions.jsonl")
    assert answers == [{key: line[key] for key in answer} for answer, line in zip(answers, lines, strict=True)]
    before = torch.tensor([list(answer["probabilities"].values()) for answer in answers])
    loaded.merge_to(tmp_path / "merged")
    assert quantized(loaded.model) == {}
    after = [
        list(loaded.task.to_json(e, a)["probabilities"].values())
        for e, a in zip(examples, loaded.answers(examples), strict=True)
    ]
    close = 1e-5 if "model.dtype=bf16" not in words else 0.05
    torch.testing.assert_close(torch.tensor(after), before, rtol=0, atol=close)


@pytest.mark.parametrize("format", FORMATS)
def test_head_and_what_is_saved_stay_whole(raw: Sections, format: str) -> None:
    model = prepare(changed(raw, f"model.quantize={format}")).model
    names = quantized(model)
    assert len(names) == 2 * 6  # two blocks of query, key, value and three dense layers
    assert not any(word in name for name in names for word in ("classifier", "pooler", "embeddings"))


def test_recipe_says_the_format(raw: Sections) -> None:
    lines = "\n".join(inspect_recipe(changed(raw, "model.quantize=nf4")).lines)
    assert 'quantize = "nf4"' in lines
    assert "base in float32, its linear layers in nf4" in lines


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("model.quantize=int4",), r"model\.quantize = 'int4': should be 'none', 'int8' or 'nf4'"),
        (("model.quantize=int8", "train.method=full"), "model.quantize = 'int8': train.method = 'full' trains"),
        (("lora.init=loftq",), "lora.init = 'loftq' needs a quantised base: set model.quantize = 'nf4'"),
    ],
)
def test_recipe_that_cannot_be_is_refused(raw: Sections, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(changed(raw, *words))


@pytest.mark.parametrize("value", ["int9", 8])
def test_folder_with_an_unknown_format_is_damaged(bert_run: Path, tmp_path: Path, value: object) -> None:
    side = json.loads((bert_run / "adapter" / "lorakit.json").read_text(encoding="utf-8"))
    side["quantize"] = value
    for name in side["files"]:
        (tmp_path / name).write_bytes((bert_run / "adapter" / name).read_bytes())
    (tmp_path / "lorakit.json").write_text(json.dumps(side), encoding="utf-8")
    with pytest.raises(AdapterError, match="damaged: quantize = "):
        load(tmp_path)
