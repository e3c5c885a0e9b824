"""Models from a hub: what it may answer, and what a user is told; the hub is one on this machine."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorakit.errors import ModelError
from lorakit.model_files import find
from lorakit.models import load_base
from tests.fake_hub import TOKEN, Hub, Repo, serving


@pytest.fixture
def hub(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub of the tiny BERT, as somebody/bert, with an older revision that has its weights as a pickle alone."""
    shutil.copytree(bert, old := tmp_path / "v1")
    torch.save(load_file(bert / "model.safetensors"), old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    shutil.copytree(bert, new := tmp_path / "main")
    (new / "pytorch_model.bin").write_bytes(b"never fetched beside safetensors")
    shutil.copytree(bert, bare := tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    with serving() as hub:
        hub.repos = {
            "somebody/bert": Repo({"main": new, "v1": old}),
            "somebody/gated": Repo({"main": new}, gated=True),
            "somebody/bare": Repo({"main": bare}),
        }
        hub.use_here(monkeypatch, tmp_path / "home")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


def fetched(hub: Hub) -> set[str]:
    return {Path(path).name for method, path, _ in hub.asked if method == "GET" and "/resolve/" in path}


def test_model_is_fetched_once_and_read_offline_from_then_on(hub: Hub, bert: Path) -> None:
    folder = find("somebody/bert")
    assert (folder / "model.safetensors").read_bytes() == (bert / "model.safetensors").read_bytes()
    assert "pytorch_model.bin" not in fetched(hub)
    hub.asked.clear()
    hub.down = 503
    assert find("somebody/bert") == folder
    assert hub.asked == []


@pytest.mark.usefixtures("base_read_anew")
def test_revision_of_pickled_weights_is_the_same_model(hub: Hub) -> None:
    models = [
        load_base("somebody/bert", "sequence_classification", labels=("a", "b"), revision=r) for r in ("v1", None)
    ]
    old, new = (base.model.state_dict() for base in models)
    assert all(torch.equal(value, new[key]) for key, value in old.items())
    assert "pytorch_model.bin" in fetched(hub)
    assert [len(base.notes) for base in models] == [1, 0]


def test_broken_download_goes_on_where_it_broke_off(hub: Hub, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 500)  # a chunk cut short is fetched again
    hub.broken["model.safetensors"] = [1200, 600]
    folder = find("somebody/bert")
    assert (folder / "model.safetensors").read_bytes() == (bert / "model.safetensors").read_bytes()
    ranges = [asked for _, path, asked in hub.asked if path.endswith("model.safetensors") and asked]
    assert ranges == ["bytes=1000-", "bytes=1500-"]


def test_download_that_was_given_up_is_not_taken_for_a_model(hub: Hub, bert: Path) -> None:
    hub.broken["model.safetensors"] = [1000, *[0] * 20]
    with pytest.raises(ModelError, match=r"its download broke off \(files that are whole are kept; try again\)"):
        find("somebody/bert")
    hub.down = 503
    with pytest.raises(ModelError, match="the hub answered 503"):
        find("somebody/bert")
    hub.down, hub.broken = 0, {}
    hub.asked.clear()
    assert (find("somebody/bert") / "model.safetensors").read_bytes() == (bert / "model.safetensors").read_bytes()
    assert fetched(hub) == {"model.safetensors"}


@pytest.mark.usefixtures("base_read_anew")
def test_gated_model_needs_a_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="gated: accept its terms on its page of the hub, and set HF_TOKEN"):
        find("somebody/gated")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert find("somebody/gated").is_dir()


def be_down(hub: Hub) -> None:
    hub.down = 500


def be_out_of_reach(hub: Hub) -> None:
    from huggingface_hub import constants

    constants.ENDPOINT = "http://127.0.0.1:9"  # undone by the fixture


OUTCOMES: dict[str, tuple[str, str | None, Callable[[Hub], None] | None, str]] = {
    "no such model": ("somebody/else", None, None, "the hub has no such model, or it is private and needs HF_TOKEN"),
    "no such revision": ("somebody/bert", "v9", None, "at revision 'v9': the hub has the model, but no such revision"),
    "no weights": ("somebody/bare", None, None, r"the hub has neither \*.safetensors nor pytorch_model\*.bin of it"),
    "an error of the hub's": ("somebody/bert", None, be_down, "the hub answered 500; try again later"),
    "no way to it": ("somebody/bert", None, be_out_of_reach, "not in the hub's cache, and the hub cannot be reached"),
    "no id": ("some body", None, None, "neither a folder nor a hub id"),
}


@pytest.mark.parametrize("case", OUTCOMES)
def test_what_a_hub_does_not_give_is_told_in_a_line(hub: Hub, case: str) -> None:
    name, revision, fault, message = OUTCOMES[case]
    if fault:
        fault(hub)
    with pytest.raises(ModelError, match=message) as caught:
        find(name, revision)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"model.base = {name!r}")
