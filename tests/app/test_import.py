"""`lorakit import` adopts what peft has written; `lorakit inspect` tells what is in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lorakit
from lorakit.errors import AdapterError, ConfigError, OutputError
from tests.app.conftest import Cli
from tests.lora.oracle import peft_save
from tests.runs import PEOPLE, save_bert

TEXTS = ["the film was superb", "a rather stale plot and a clumsy cast"]


def foreign(base: Path, folder: Path, num_labels: int = 2, **kw: Any) -> peft.PeftModel:
    """An adapter of peft's over the base, moved off its start and saved in `folder`."""
    torch.manual_seed(3)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=num_labels)
    settings = {"target_modules": ["query", "value"], "r": 3, "lora_alpha": 6, "task_type": "SEQ_CLS"}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{**settings, **kw})).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    peft_save(adapted, folder)
    return adapted


WITH_POOLER = {"modules_to_save": ["pooler"]}


@torch.no_grad()
def probabilities(model: peft.PeftModel, base: Path) -> torch.Tensor:
    """What peft's model answers to TEXTS. Shapes: (texts, labels)."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    return model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits.softmax(-1)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"use_rslora": True, "alpha_pattern": {"query": 2}}])
def test_imported_adapter_answers_as_peft_does(cli: Cli, bert: Path, tmp_path: Path, settings: Any) -> None:
    theirs = foreign(bert, tmp_path / "theirs", 3, **WITH_POOLER, **settings)
    code, out, err = cli("import", "theirs", "--out", "ours", "--labels", "bad,fair,good")
    assert (code, err) == (0, "")
    assert "r 3, alpha 6, over query, value" in out
    assert "labels: bad, fair, good" in out
    answers = lorakit.load(tmp_path / "ours").predict(TEXTS)
    wanted = probabilities(theirs, bert)
    for answer, row in zip(answers, wanted, strict=True):
        got = torch.tensor([answer["probabilities"][name] for name in ("bad", "fair", "good")])
        torch.testing.assert_close(got, row, rtol=0, atol=2e-6)
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


class Theirs(NamedTuple):
    """An adapter of peft's with two labels, in a folder that is not to be changed."""

    folder: Path
    model: peft.PeftModel

    def edited(self, folder: Path, **changes: Any) -> Path:
        """A copy with other settings."""
        shutil.copytree(self.folder, folder)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return folder


@pytest.fixture(scope="module")
def theirs(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Theirs:
    folder = tmp_path_factory.mktemp("theirs")
    return Theirs(folder, foreign(bert, folder, **WITH_POOLER))


def test_imported_adapter_is_exported_and_read_by_peft_again(
    cli: Cli, bert: Path, theirs: Theirs, tmp_path: Path
) -> None:
    assert cli("import", theirs.folder, "--out", "ours").code == 0
    assert cli("export", "ours", "--to", "peft", "--out", "back").code == 0
    base = transformers.AutoModelForSequenceClassification.from_pretrained(bert)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "back").eval()
    torch.testing.assert_close(probabilities(again, bert), probabilities(theirs.model, bert), rtol=0, atol=1e-6)


def test_labels_come_from_the_base_and_pairs_are_answered(cli: Cli, theirs: Theirs, tmp_path: Path) -> None:
    code, out, _ = cli("import", theirs.folder, "--out", "ours", "--pair", "hypothesis")
    assert code == 0
    assert "labels: LABEL_0, LABEL_1\nthe labels are only numbered; name them with --labels" in out
    assert lorakit.load(tmp_path / "ours").predict([("a film", "a plot")])[0]["label"].startswith("LABEL_")


def test_t5_needs_the_names_of_its_types(cli: Cli, t5: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(t5)
    config = peft.LoraConfig(target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    peft_save(peft.get_peft_model(model, config), tmp_path / "theirs")
    code, _, err = cli("import", "theirs", "--out", "ours")
    assert code == 2
    assert "--labels PER,LOC" in err
    assert cli("import", "theirs", "--out", "ours", "--labels", "PER,LOC").code == 0
    assert "entities" in lorakit.load(tmp_path / "ours").predict([PEOPLE[0]])[0]


# What is refused


def imported(source: Path, out: Path, **kw: Any) -> list[str]:
    from lorakit.app.commands.import_ import import_adapter

    return import_adapter(source, out, **kw)


def test_wrong_number_of_labels_is_refused(bert: Path, tmp_path: Path) -> None:
    foreign(bert, tmp_path / "theirs", 3, **WITH_POOLER)
    for labels, whose in (((), "names 2"), (("a", "b"), "--labels has 2")):
        with pytest.raises(ConfigError, match=rf"its head has 3 labels, .*{whose} .*pass 3 with --labels"):
            imported(tmp_path / "theirs", tmp_path / "ours", labels=labels)


def test_adapter_that_lacks_what_the_base_lacks_is_refused(bert: Path, tmp_path: Path) -> None:
    """peft saves the head alone, so the pooler that it drew anew is lost: such an adapter answers at random."""
    foreign(bert, tmp_path / "theirs")
    with pytest.raises(
        AdapterError, match=r"has bert\.pooler\.dense\.bias and 1 more tensors.* answers would be random"
    ):
        imported(tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize(
    ("changes", "needs", "message"),
    [
        (
            {"task_type": None},
            {"task": "sequence_classification"},
            r"task_type None does not determine the task; pass --task",
        ),
        ({"base_model_name_or_path": None}, {"base": "bert"}, "does not name its base model; pass --base"),
    ],
)
def test_what_the_settings_leave_open_has_to_be_given(
    theirs: Theirs, bert: Path, tmp_path: Path, changes: dict[str, Any], needs: dict[str, str], message: str
) -> None:
    folder = theirs.edited(tmp_path / "theirs", **changes)
    with pytest.raises(ConfigError, match=message):
        imported(folder, tmp_path / "ours")
    assert imported(folder, tmp_path / "ours", **{key: str(bert) if key == "base" else needs[key] for key in needs})


def test_adapter_of_another_architecture_or_with_nan_is_refused_and_nothing_is_left(
    theirs: Theirs, t5: Path, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match="does not fit this model"):
        imported(theirs.folder, tmp_path / "ours", base=str(t5), task="text2text_ner", labels=("PER",))
    weights = theirs.edited(tmp_path / "theirs") / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors[next(iter(tensors))].fill_(float("nan"))
    save_file(tensors, weights)
    with pytest.raises(AdapterError, match="NaN"):
        imported(tmp_path / "theirs", tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_out_that_exists_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="exists already"):
        imported(tmp_path / "theirs", tmp_path)


def test_imported_adapter_knows_its_base(cli: Cli, bert: Path, tmp_path: Path) -> None:
    here = save_bert(tmp_path / "base")
    foreign(here, tmp_path / "theirs", **WITH_POOLER)
    assert cli("import", "theirs", "--out", "ours").code == 0
    save_bert(tmp_path / "base", seed=5)
    with pytest.raises(AdapterError, match="trained on a different"):
        lorakit.load(tmp_path / "ours")


# inspect


def test_inspect_shows_the_table_from_foreign_files_alone(cli: Cli, bert: Path, tmp_path: Path) -> None:
    settings = {"rank_pattern": {"layer.0.attention.self.query": 5}, "alpha_pattern": {"value": 4.5}, "use_dora": True}
    model = foreign(bert, tmp_path / "theirs", **settings)
    code, out, _ = cli("inspect", "theirs", "--json")
    assert code == 0
    targets = {row["module"]: row for row in json.loads(out)["targets"]}
    wanted = {}
    for path, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            count = sum(p.numel() for name, p in module.named_parameters() if "lora_" in name)
            row = {"r": module.r["default"], "parameters": count, "matched_by": path.rpartition(".")[2]}
            wanted[path] = {"module": path, "alpha": module.lora_alpha["default"], **row}
    assert targets == wanted
    head = model.base_model.model.classifier.modules_to_save["default"]
    assert json.loads(out)["parameters"]["saved"] == sum(p.numel() for p in head.parameters())


def test_inspect_prints_a_line_for_each_layer_of_a_run(cli: Cli, bert_run: Path) -> None:
    _, out, _ = cli("inspect", bert_run)
    rows = [line.split() for line in out.splitlines() if line.startswith("bert.encoder.layer.")]
    shapes = load_file(bert_run / "adapter" / "adapter_model.safetensors")
    assert len(rows) == 12
    for module, *by, r, alpha, count in rows:
        A, B = (shapes[f"base_model.model.{module}.lora_{factor}.weight"] for factor in "AB")
        assert (" ".join(by), r, alpha) == ("its whole path", "4", "16")
        assert count == str(A.numel() + B.numel())
    assert "trained in full: bert.pooler.dense, classifier" in out


@pytest.mark.parametrize(("what", "key"), [("run", "targets"), ("model", "linear"), ("recipe", "targets")])
def test_inspect_json_is_json_alone(cli: Cli, bert_run: Path, bert: Path, what: str, key: str) -> None:
    code, out, _ = cli("inspect", {"run": bert_run, "model": bert, "recipe": bert_run / "recipe.toml"}[what], "--json")
    assert (code, len(json.loads(out)[key]) > 1) == (0, True)


def test_inspect_refuses_a_pattern_that_would_take_for_ever(cli: Cli, theirs: Theirs, tmp_path: Path) -> None:
    code, _, err = cli("inspect", theirs.edited(tmp_path / "theirs", alpha_pattern={"((a)": 1.0}))
    assert code == 2
    assert "alpha_pattern: '((a)' cannot be used" in err
