"""A base model's folder is somebody else's: its code never runs."""

from __future__ import annotations

import ast
import builtins
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import lorakit
from lorakit.errors import ModelError
from lorakit.models import load_base, load_tokenizer
from tests.app.conftest import Cli

AUTO = {"AutoConfig": "own.Config", "AutoModelForSequenceClassification": "own.Model"}
RUNS_CODE = {"from_pretrained", "from_config", "get_class_from_dynamic_module", "pipeline"}
CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nraise SystemExit('ran')\n"


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None takes a key away."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.fixture
def base(bert: Path, tmp_path: Path) -> Path:
    """A copy of the tiny BERT, to be changed."""
    shutil.copytree(bert, tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def agreeable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks on the terminal is told yes."""
    monkeypatch.setattr(builtins, "input", lambda *_: "y")


# Code


def with_code(base: Path) -> Path:
    """The base as a model that needs a Python file of its own."""
    edit(base / "config.json", model_type="own", auto_map=AUTO)
    (base / "own.py").write_text(CODE)
    return base


@pytest.mark.usefixtures("agreeable")
def test_code_in_a_base_is_refused_whatever_reads_it(
    cli: Cli, base: Path, bert_run: Path, files: Path, tmp_path: Path
) -> None:
    with_code(base)
    adapter = shutil.copytree(bert_run / "adapter", tmp_path / "theirs")  # that names its base by a relative path
    edit(adapter / "adapter_config.json", base_model_name_or_path="base")
    commands = [
        ("train", files / "train.csv", "--model", "base", "--dry-run"),
        ("inspect", "base"),
        ("import", "theirs", "--out", "ours"),
        ("import", "theirs", "--out", "ours", "--dry-run", "--base", "base"),
        ("check", files / "train.csv", "--model", "base"),
    ]
    for words in commands:
        code, _, err = cli(*words)
        assert code == 2, err
        assert "'base': needs code of its own (auto_map in config.json), which lorakit never runs" in err
    assert not (base / "ran").exists()


@pytest.mark.usefixtures("agreeable", "base_read_anew")
def test_code_of_a_tokenizer_is_refused(base: Path) -> None:
    edit(base / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": [None, "own.Tokenizer"]})
    edit(base / "config.json", model_type="vit")  # a family without a tokenizer in transformers
    (base / "own.py").write_text(CODE)
    with pytest.raises(ModelError, match=r"code of its own \(auto_map in tokenizer_config.json\)"):
        load_tokenizer(str(base), "sequence_classification")
    assert not (base / "ran").exists()


@pytest.mark.usefixtures("base_read_anew")
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_kernel_that_a_config_names_is_not_fetched(base: Path, key: str) -> None:
    edit(base / "config.json", **{key: "kernels-community/own"})
    model: Any = load_base(str(base), "sequence_classification", labels=("a", "b")).model
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.usefixtures("base_read_anew")
@pytest.mark.parametrize(
    ("key", "value"),
    [("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}), ("hidden_size", "16")],
)
def test_config_that_transformers_fails_on_is_a_mistake_in_the_model(base: Path, key: str, value: Any) -> None:
    edit(base / "config.json", **{key: value})
    with pytest.raises(ModelError, match=r"model\.base = '.*base': "):
        load_base(str(base), "sequence_classification", labels=("a", "b"))


def test_every_reading_by_transformers_goes_through_one_place() -> None:
    """No from_pretrained, nor what else runs code that a file brings, elsewhere; and no trust there."""
    found = []
    for path in sorted(Path(lorakit.__file__).parent.rglob("*.py")):
        for top in ast.parse(path.read_text(encoding="utf-8")).body:
            for node in ast.walk(top):
                if isinstance(node, ast.Attribute) and node.attr in RUNS_CODE:
                    found.append((path.name, getattr(top, "name", ""), node.attr))
                if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                    found.append((path.name, getattr(top, "name", ""), f"trust_remote_code={ast.unparse(node.value)}"))
    here = ("models.py", "_from_pretrained")
    assert sorted(found) == [(*here, "from_pretrained"), (*here, "trust_remote_code=False")]
