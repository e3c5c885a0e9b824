"""Ray: what its processes compute is what one machine's compute, and a process that dies is replaced."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

import httpx2
import numpy as np
import pytest

from lorakit.app.on_ray import Scorer, deployment, score_on_ray, train_on_ray
from lorakit.errors import ConfigError, DataError, OutputError
from lorakit.inference.predictor import load
from lorakit.recipe import Recipe
from tests.runs import changed, reviews, scores_of, sections, weights

TEXTS = [text for text, _ in reviews(50)]
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
WAIT_S = 300


def test_scorer_adds_what_predict_writes(bert_run: Path) -> None:
    plain = load(bert_run).predict(TEXTS)
    batch = {"id": np.arange(50), "text": np.array(TEXTS, object)}
    scored = Scorer(str(bert_run))(batch)
    assert list(scored) == ["id", "text", "answer"]
    assert [json.loads(answer) for answer in scored["answer"]] == plain


@pytest.mark.skipif(find_spec("ray") is not None, reason="ray is installed")
def test_without_ray_it_is_said_what_to_install(bert: Path, files: Path) -> None:
    for call in (
        lambda: train_on_ray(changed(sections(bert, files))),
        lambda: score_on_ray(None, "run"),
        lambda: deployment(["run"]),
    ):
        with pytest.raises(ConfigError, match=r"this needs ray: pip install 'lorakit\[ray\]'"):
            call()


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster of this machine, with cores enough for two workers whatever the machine has."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # else they wait for whatever else runs
        ray.init(num_cpus=6, include_dashboard=False, configure_logging=False, log_to_driver=False)
    yield
    ray.shutdown()


faults = [pytest.mark.faults, needs_ray, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("cluster")]


class TestRay:
    pytestmark = faults

    def recipe(self, bert: Path, files: Path, folder: Path, *words: str) -> Recipe:
        return changed(sections(bert, files), f"output.dir={folder}", *words)

    def train_plainly(self, recipe: Recipe) -> None:
        path = Path(f"{recipe.output.dir}.toml")
        path.write_text(recipe.to_toml())
        command = [sys.executable, "-m", "lorakit", "train", str(path), "--nproc", "2"]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def test_training_equals_two_ranks_of_torchrun(self, bert: Path, files: Path, tmp_path: Path) -> None:
        on_ray = train_on_ray(self.recipe(bert, files, tmp_path / "ray"), storage=str(tmp_path / "notes"))
        self.train_plainly(self.recipe(bert, files, tmp_path / "plain"))
        assert weights(on_ray.folder) == weights(tmp_path / "plain")
        assert on_ray.scores["accuracy"] == scores_of(tmp_path / "plain")["accuracy"]
        with pytest.raises(OutputError, match="exists already"):
            train_on_ray(self.recipe(bert, files, tmp_path / "ray"), storage=str(tmp_path / "notes"))

    def test_a_killed_worker_is_replaced_and_the_run_goes_on(self, bert: Path, files: Path, tmp_path: Path) -> None:
        words = ("train.epochs=40", "train.eval_every=100", "train.checkpoint_every=5")
        self.train_plainly(self.recipe(bert, files, tmp_path / "plain", *words))
        folder, killed = tmp_path / "killed", []

        def kill() -> None:
            began = time.monotonic()
            while not any((folder / "checkpoints").glob("step-*")):
                assert time.monotonic() - began < WAIT_S
                time.sleep(0.05)
            killed.append(int((folder / ".lock").read_text().split()[1]))
            os.kill(killed[0], signal.SIGKILL)

        killer = Thread(target=kill)
        killer.start()
        found = train_on_ray(self.recipe(bert, files, folder, *words), storage=str(tmp_path / "notes"))
        killer.join()
        assert killed and weights(found.folder) == weights(tmp_path / "plain")

    def test_a_mistake_is_told_and_not_tried_again(self, bert: Path, files: Path, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="missing"):
            recipe = self.recipe(bert, files, tmp_path / "run", f"data.train={tmp_path / 'missing.csv'}")
            train_on_ray(recipe, storage=str(tmp_path / "notes"))

    def test_scoring_equals_the_plain_one(self, bert_run: Path) -> None:
        import ray

        rows = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
        scored = score_on_ray(ray.data.from_items(rows), bert_run, actors=2, batch_size=16).take_all()
        found = {row["id"]: json.loads(row["answer"]) for row in scored}
        plain = load(bert_run).predict(TEXTS)
        assert len(scored) == len(found) == len(TEXTS)
        for i, answer in enumerate(plain):
            assert found[i]["label"] == answer["label"] and found[i]["score"] == pytest.approx(
                answer["score"], abs=1e-6
            )

    def test_server_answers_once_it_has_loaded(self, bert_run: Path) -> None:
        from ray import serve

        serve.start(http_options={"port": 8473})
        serve.run(deployment([bert_run], replicas=2), route_prefix="/")
        try:
            url = "http://127.0.0.1:8473"
            assert httpx2.get(f"{url}/health", timeout=60).status_code == 200
            answers = httpx2.post(f"{url}/predict", json={"inputs": [[text] for text in TEXTS[:8]]}, timeout=60).json()
            plain = load(bert_run).predict(TEXTS[:8])
            assert [max(some, key=lambda a: a["score"])["label"] for some in answers] == [p["label"] for p in plain]
        finally:
            serve.shutdown()
