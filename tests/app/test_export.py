"""`lorakit export` over trained runs: other programs read the folder, and the command says what it changed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import lorakit
from lorakit.app.commands.export import CONSUMERS, WHOLE, export_run
from lorakit.app.export.adapters import Parity
from lorakit.errors import ConfigError, OutputError
from lorakit.lora import Layer, hosts
from lorakit.lora.export_profiles import PROFILES
from tests.app.conftest import Cli
from tests.runs import changed, fit, sections

PLAIN = [name for name, profile in PROFILES.items() if not profile.everything]


def base_of(run: Path, auto: type) -> nn.Module:
    """The plain base model with a random head of the right size."""
    side = json.loads((run / "adapter" / "lorakit.json").read_text())
    return auto.from_pretrained(side["base"]["name"], num_labels=len(side["labels"])).eval()


@torch.no_grad()
def answers(model: nn.Module) -> Tensor:
    """The logits of any of these models for a few arbitrary ids."""
    batch = {"input_ids": torch.arange(5, 29).view(3, 8)}
    if model.config.is_encoder_decoder:
        batch["labels"] = batch["input_ids"]
    logits: Tensor = model(**batch).logits
    return logits


@pytest.fixture(scope="module")
def dora_run(bert: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = changed(sections(bert, files), "lora.use_dora=true", "lora.r=3", "train.max_steps=3")
    return fit(recipe, tmp_path_factory.mktemp("dora")).folder


@pytest.fixture(scope="module")
def mixed_run(bert: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ranks, alphas and layers that differ."""
    words = ("lora.use_rslora=true", "lora.target_modules=query,value", "lora.rank_pattern={value=2}")
    more = ("lora.alpha_pattern={query=4}", "lora.layers_to_transform=[1]", "train.max_steps=3")
    return fit(changed(sections(bert, files), *words, *more), tmp_path_factory.mktemp("mixed")).folder


def test_consumers_of_the_command_line_are_the_profiles() -> None:
    assert set(CONSUMERS) == {*WHOLE, *PROFILES}


def test_peft_reads_what_was_exported_for_it(cli: Cli, tagger_run: Path, tmp_path: Path) -> None:
    code, out, _ = cli("export", tagger_run, "--to", "peft", "--out", "out")
    assert code == 0, out
    assert out.startswith("nothing had to be changed\ncheck: read back from the files, logits differ by at most 0 ")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    base = base_of(tagger_run, transformers.AutoModelForTokenClassification)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    torch.testing.assert_close(answers(theirs), answers(lorakit.load(tagger_run).model), rtol=0, atol=1e-6)


def test_check_reads_no_more_than_the_model_has_places_for(cli: Cli, bert: Path, files: Path, tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(bert, max_position_embeddings=11)
    shutil.copytree(bert, short := tmp_path / "short")
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(short)
    run = fit(changed(sections(short, files), "train.max_steps=1"), tmp_path / "run").folder
    assert cli("export", run, "--to", "peft", "--out", "out")[0] == 0


@pytest.mark.parametrize(("tuned", "code"), [({}, 0), ({"thresholds": 5}, 2)])
def test_what_was_tuned_fits_the_task_or_is_refused(
    cli: Cli, bert_run: Path, tmp_path: Path, tuned: object, code: int
) -> None:
    """What was combined has no temperature, whatever its runs had."""
    shutil.copytree(bert_run / "adapter", folder := tmp_path / "adapter")
    side = json.loads((folder / "lorakit.json").read_text())
    side["task"]["calibrate"] = True
    (folder / "lorakit.json").write_text(json.dumps(side | {"tuned": tuned}))
    ended, _, err = cli("export", folder, "--to", "peft", "--out", "out")
    assert ended == code
    assert ("not fit" in err) == (code != 0)


def test_merged_is_a_plain_model_with_the_same_answers(cli: Cli, t5_run: Path, tmp_path: Path) -> None:
    code, out, _ = cli("export", t5_run, "--to", "merged", "--out", "out")
    assert code == 0
    assert re.match(
        r"check: .* differ by at most \S+ \(largest \S+\), no answers differ\nexported for merged: out\n$", out
    )
    plain = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(answers(plain), answers(lorakit.load(t5_run).model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("consumer", ["vllm", "llamacpp"])
def test_plain_consumers_get_factors_with_one_scaling(cli: Cli, mixed_run: Path, tmp_path: Path, consumer: str) -> None:
    code, out, _ = cli("export", mixed_run, "--to", consumer, "--out", "out")
    assert code == 0
    subjects = [line.partition(":")[0] for line in out.splitlines()]
    rest = ["target_modules", "head", "check", "use", f"exported for {consumer}"]
    assert subjects == ["scaling", "rank", *rest]
    raw = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    model = lorakit.load(mixed_run).model
    for path, host in hosts(model):
        if isinstance(host, Layer):
            A, B = (tensors[f"base_model.model.{path}.lora_{factor}.weight"] for factor in "AB")
            wanted = host.lora("default").delta_weight(host)
            torch.testing.assert_close(raw["lora_alpha"] / raw["r"] * B @ A, wanted, rtol=0, atol=1e-6)
    side = json.loads((mixed_run / "adapter" / "lorakit.json").read_text())
    assert raw["base_model_name_or_path"] == side["base"]["name"]


def test_head_that_was_split_off_completes_the_model(cli: Cli, bert_run: Path, tmp_path: Path) -> None:
    cli("export", bert_run, "--to", "vllm", "--out", "out")
    base = base_of(bert_run, transformers.AutoModelForSequenceClassification)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    head = load_file(tmp_path / "out" / "head" / "model.safetensors")
    assert {key.partition(".")[0] for key in head} == {"classifier", "bert"}  # the pooler was new as well
    theirs.base_model.model.load_state_dict(head, strict=False)
    torch.testing.assert_close(answers(theirs), answers(lorakit.load(bert_run).model), rtol=0, atol=1e-6)


def test_adapter_folder_gives_the_same_bytes_but_for_the_base_s_name(cli: Cli, bert_run: Path, tmp_path: Path) -> None:
    cli("export", bert_run, "--to", "vllm", "--out", "a")
    _, out, _ = cli("export", bert_run / "adapter", "--to", "vllm", "--out", "b", "--base-name", "some/base")
    assert "base model: called some/base" in out
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()} for name in "ab")
    configs = [json.loads(files.pop("adapter_config.json")) for files in (first, second)]
    assert configs[1].pop("base_model_name_or_path") == "some/base" != configs[0].pop("base_model_name_or_path")
    assert (first, configs[0]) == (second, configs[1])


def test_number_of_labels_is_named_to_peft_s_user(tagger_run: Path, tmp_path: Path) -> None:
    side = json.loads((tagger_run / "adapter" / "lorakit.json").read_text())
    lines = export_run(tagger_run, "peft", tmp_path / "out").lines
    assert any(f"num_labels={len(side['labels'])}" in line and side["labels"][0] in line for line in lines)


# DoRA


def test_dora_is_refused_by_plain_consumers_unless_cut_to_a_rank(cli: Cli, dora_run: Path, tmp_path: Path) -> None:
    for consumer in PLAIN:
        code, _, err = cli("export", dora_run, "--to", consumer, "--out", "out")
        assert (code, "does not support DoRA" in err, "--to merged" in err) == (2, True, True)
        assert list(tmp_path.iterdir()) == []
    code, out, _ = cli("export", dora_run, "--to", "vllm", "--rank", 5, "--out", "out")
    assert code == 0
    assert re.search(r"cut by SVD to rank 5: \d+ of \d+ updates; \d+\.\d+% .* on average, at most \d+\.\d+%", out)
    raw = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (raw["r"], raw["use_dora"]) == (5, False)


# What cannot be done


def test_out_that_exists_is_left_alone(bert_run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for to in CONSUMERS:
        with pytest.raises(OutputError, match="exists already"):
            export_run(bert_run, to, tmp_path / "out")


def test_full_fine_tuning_has_no_adapter(bert_run: Path, tmp_path: Path) -> None:
    shutil.copytree(bert_run / "adapter", folder := tmp_path / "full")
    side = json.loads((folder / "lorakit.json").read_text())
    (folder / "lorakit.json").write_text(json.dumps({**side, "method": "full"}))
    with pytest.raises(ConfigError, match=r"fully fine-tuned.*--to merged"):
        export_run(folder, "vllm", tmp_path / "out")


def test_export_that_differs_is_not_published(bert_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lorakit.app.export.adapters as exporting

    monkeypatch.setattr(exporting, "_parity", lambda *_: Parity(0.5, 1.0, 0.1, 1.0))
    with pytest.raises(RuntimeError, match="differs from the adapter; nothing was written"):
        export_run(bert_run, "vllm", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
