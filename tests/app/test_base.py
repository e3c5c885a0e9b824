"""A base model's folder is somebody else's: its code never runs, and another base is told from the one trained on."""

from __future__ import annotations

import builtins
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

import lorakit
from lorakit import hashing
from lorakit.errors import AdapterError, ConfigError, ModelError
from lorakit.hashing import file_sha256, fingerprint_of, weights_sha256
from lorakit.inference.adapter_pool import AdapterPool
from lorakit.models import load_base, load_tokenizer
from tests.app.conftest import Cli
from tests.runs import Stopped, changed, fit, resumed, sections, stop_after

AUTO = {"AutoConfig": "own.Config", "AutoModelForSequenceClassification": "own.Model"}
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
    """Every question on the terminal is answered with yes."""
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


# Another base


def unlike(base: Path) -> dict[str, Callable[[], None]]:
    """Edits that leave the weights as they are and change answers, by the part that they change."""

    def swap() -> None:
        content = json.loads((base / "tokenizer.json").read_text())
        words = content["model"]["vocab"]
        words["superb"], words["stale"] = words["stale"], words["superb"]
        (base / "tokenizer.json").write_text(json.dumps(content))

    return {
        "config heads": lambda: edit(base / "config.json", num_attention_heads=4),
        "config activation": lambda: edit(base / "config.json", hidden_act="relu"),
        "config epsilon": lambda: edit(base / "config.json", layer_norm_eps=0.1),
        "tokenizer vocabulary": swap,
        "tokenizer case": lambda: edit(base / "tokenizer_config.json", do_lower_case=False),
        "tokenizer special": lambda: edit(base / "tokenizer_config.json", cls_token="[SEP]"),
    }


def alike(base: Path) -> None:
    """Edits that change no answer: other names, another version, keys that say nothing, another layout of the files."""
    names = {"transformers_version": "5.99.0", "_name_or_path": "elsewhere", "id2label": {"0": "x"}, "dtype": "float16"}
    edit(base / "config.json", **names, architectures=["BertForMaskedLM"])
    changes = {"name_or_path": "elsewhere", "tokenizer_class": "BertTokenizerFast", "strip_accents": None}
    edit(base / "tokenizer_config.json", **changes)
    content = json.loads((base / "tokenizer.json").read_text())
    cut = {"direction": "Right", "max_length": 7, "strategy": "LongestFirst", "stride": 0}
    (base / "tokenizer.json").write_text(json.dumps({**dict(reversed(content.items())), "truncation": cut}, indent=3))


KINDS_OF_EDIT = list(unlike(Path()))


@pytest.fixture
def run(base: Path, bert_run: Path, tmp_path: Path) -> Path:
    """A run over the base that is to be changed."""
    folder = shutil.copytree(bert_run / "adapter", tmp_path / "run")
    side = json.loads((folder / "lorakit.json").read_text())
    edit(folder / "lorakit.json", base={**side["base"], "name": str(base)})
    return folder


@pytest.mark.parametrize("name", KINDS_OF_EDIT)
def test_another_base_is_refused_and_the_part_named(name: str, base: Path, run: Path) -> None:
    part = name.split()[0]
    before = fingerprint_of(base)
    unlike(base)[name]()
    changed = fingerprint_of(base)
    assert [key for key in before._fields if getattr(before, key) != getattr(changed, key)] == [part]
    with pytest.raises(
        AdapterError, match=rf"trained on a different .*base: its {part} has sha256 \w{{12}}\.\.\., the one found"
    ):
        lorakit.load(run)
    if name == "config activation":
        assert lorakit.load(run, allow_base_mismatch=True).predict(["a superb film"])


def test_base_that_answers_the_same_is_taken(base: Path, run: Path) -> None:
    before, answer = fingerprint_of(base), lorakit.load(run).predict(["a superb film"])
    alike(base)
    assert fingerprint_of(base) == before
    assert lorakit.load(run).predict(["a superb film"]) == answer


def test_fingerprint_is_the_same_in_another_process(base: Path, t5: Path) -> None:
    code = "import sys; from pathlib import Path; from lorakit.hashing import fingerprint_of as f\n"
    code += "for folder in sys.argv[1:]: print(*f(Path(folder)))"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code, base, t5], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines() == [" ".join(fingerprint_of(folder)) for folder in (base, t5)], done.stderr


def test_vocabulary_without_tokenizer_json_counts(roberta: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(roberta, tmp_path / "slow")
    (folder / "tokenizer.json").unlink()
    before = fingerprint_of(folder).tokenizer
    merges = (folder / "merges.txt").read_text().splitlines()
    (folder / "merges.txt").write_text("\n".join([merges[0], *reversed(merges[1:])]))
    assert fingerprint_of(folder).tokenizer != before


def test_older_folder_is_read_with_a_note(cli: Cli, run: Path) -> None:
    side = json.loads((run / "lorakit.json").read_text())
    old = {key: side["base"][key] for key in ("name", "revision", "sha256")}
    edit(run / "lorakit.json", base=old)
    code, out, err = cli("predict", run, "a superb film")
    assert (code, out.count("\n")) == (0, 1)
    assert "written by an older lorakit: the base's config and tokenizer cannot be compared" in err


def test_resuming_over_another_base_is_refused(base: Path, files: Path, tmp_path: Path) -> None:
    recipe = sections(base, files)
    recipe["train"] |= {"checkpoint_every": 2, "epochs": 1}
    with pytest.raises(Stopped):
        fit(changed(recipe), tmp_path / "out", stop_after(3))
    edit(base / "config.json", num_attention_heads=4)
    with pytest.raises(ConfigError, match=r"--resume: the base model changed .*: its config has sha256"):
        resumed(changed(recipe), tmp_path / "out")


def test_adapters_over_unlike_bases_share_none(base: Path, run: Path, bert_run: Path) -> None:
    edit(base / "config.json", hidden_act="relu")
    other = fingerprint_of(base)
    side = json.loads((run / "lorakit.json").read_text())
    edit(run / "lorakit.json", base={**side["base"], "config_sha256": other.config})
    message = r"than that of the others: its config has sha256"
    with AdapterPool({"first": bert_run, "second": run}) as pool, pytest.raises(AdapterError, match=message):
        pool.load("second").result()


# Files that are not what their name says


@pytest.mark.parametrize("kind", ["pipe", "device", "cut off", "32 GB of nothing", "nowhere"])
def test_weights_that_are_none_are_refused_at_once(kind: str, base: Path) -> None:
    path = base / "model.safetensors"
    data = path.read_bytes()
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "cut off":
        path.write_bytes(data[:-1])
    elif kind == "32 GB of nothing":
        with path.open("wb") as file:
            file.truncate(2**35)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "nowhere")
    with pytest.raises(ModelError, match=r"model\.safetensors: (cannot be read|damaged)"):
        fingerprint_of(base)


@pytest.mark.usefixtures("base_read_anew")
@pytest.mark.parametrize("layers", [10**6, 0, -1])
def test_config_of_a_million_layers_or_none_is_refused(base: Path, layers: int) -> None:
    edit(base / "config.json", num_hidden_layers=layers)
    with pytest.raises(ModelError, match=f"num_hidden_layers = {layers}: a model has 1 to 1,000 layers"):
        load_base(str(base), "sequence_classification", labels=("a", "b"))


# A sum that is remembered


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Mock:
    """Calls that read all of a file for its sum; sums of small files and of new ones are remembered too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashing, "REMEMBERED", 0)
    monkeypatch.setattr(hashing, "SETTLED_S", -1e9)
    counted = Mock(wraps=file_sha256)
    monkeypatch.setattr(hashing, "file_sha256", counted)
    return counted


def test_weights_are_read_once_for_their_sum(base: Path, sums: Mock) -> None:
    assert fingerprint_of(base) == fingerprint_of(base)
    assert sums.call_count == 1
    assert weights_sha256(base) == file_sha256(base / "model.safetensors")


def overwrite(path: Path, at: int = -1) -> None:
    """Change a byte, and set the time back to what it was."""
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=times)


def replace(path: Path) -> None:
    """Put another file of the same size and time in its place."""
    shutil.copy2(path, path.with_name("other"))
    overwrite(path.with_name("other"))
    path.with_name("other").replace(path)


@pytest.mark.parametrize("change", [overwrite, replace])
def test_a_remembered_sum_is_not_that_of_another_file(base: Path, sums: Mock, change: Callable[[Path], None]) -> None:
    before, path = weights_sha256(base), base / "model.safetensors"
    change(path)
    assert before != weights_sha256(base) == file_sha256(path)


def test_a_sum_is_not_remembered_of_a_file_that_may_be_written_to(
    base: Path, sums: Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "SETTLED_S", 1e9)
    assert weights_sha256(base) == weights_sha256(base)
    assert sums.call_count == 2


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"stamp": {}, "sha256": ""}', b"\xff", None])
def test_a_damaged_entry_is_not_used(base: Path, sums: Mock, tmp_path: Path, content: bytes | None) -> None:
    before = weights_sha256(base)
    (entry,) = (tmp_path / "cache" / "lorakit" / "weights").iterdir()
    known = json.loads(entry.read_bytes())
    entry.write_bytes(json.dumps({**known, "sha256": "no sum"}).encode() if content is None else content)
    assert weights_sha256(base) == before
    assert sums.call_count == 2


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "HOME"])
def test_a_home_that_cannot_be_written_does_without(
    base: Path, sums: Mock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", "here")  # of which only absolute paths count
    monkeypatch.setenv(variable, str(tmp_path / "file"))
    assert weights_sha256(base) == weights_sha256(base)
    assert sums.call_count == 2 and not Path("here").exists()
