"""Training, scoring and serving on a Ray cluster, by the same functions as on one machine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.app.api import folder_of, train_recipe
from lorakit.errors import ConfigError, LorakitError, RankError
from lorakit.inference.predictor import load
from lorakit.recipe import Recipe, make_recipe
from lorakit.runtime.distributed import TIMEOUT
from lorakit.training.joint import END_ALL
from lorakit.training.results import Result
from lorakit.training.run_files import run_folder

if TYPE_CHECKING:
    from numpy.typing import NDArray

BACKEND = "cpu:gloo,cuda:nccl"  # counts are summed on the CPU
MIB = 2**20


# Training


def train_on_ray(
    recipe: Recipe,
    *,
    workers: int = 2,
    gpu: bool = False,
    cpus: float = 1,
    resume: str | None = None,
    max_failures: int = 3,
    storage: str | None = None,
) -> Result:
    """Train a recipe as `workers` ranks, each a process of a Ray cluster with a GPU or with `cpus` cores.

    The recipe's files and its `output.dir` must be visible to every worker; relative paths are this process's. A worker that
    dies is replaced up to `max_failures` times, and the run continues from its newest checkpoint. `storage` is where Ray
    keeps its own state, on a file system that all nodes see.

    Raises:
        LorakitError: as `train_recipe`; mistakes are not retried. ConfigError: Ray is not installed.
    """
    with _ray_needed():
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
    with run_folder(folder_of(recipe), resume):
        pass  # refused here rather than in every worker
    is_new = resume is None
    trainer = TorchTrainer(
        _train,
        train_loop_config={
            "recipe": recipe.model_dump(mode="json"),
            "folder": str(Path.cwd()),
            "resume": "auto" if is_new else resume,  # a worker that replaces another must go on
        },
        torch_config=TorchConfig(backend=BACKEND if gpu else "gloo", timeout_s=int(TIMEOUT.total_seconds())),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpu, resources_per_worker={"CPU": cpus}),
        run_config=RunConfig(storage_path=storage, failure_config=FailureConfig(max_failures=max_failures)),
    )
    outcome = trainer.fit().return_value
    if isinstance(outcome, LorakitError):
        raise outcome
    return Result(Path(outcome["folder"]), outcome["scores"])


def _train(settings: Mapping[str, Any]) -> dict[str, Any] | LorakitError:
    """The work of each worker. A mistake is returned, since Ray would retry after an error."""
    os.chdir(settings["folder"])
    try:
        result = train_recipe(make_recipe(settings["recipe"]), resume=settings["resume"])
    except LorakitError as err:
        if err.exit_code in END_ALL:
            raise
        return ConfigError(str(err)) if isinstance(err, RankError) else err
    return {"folder": str(result.folder), "scores": result.scores}


# Scoring


class Scorer:
    """Adds the column `answer` to batches of texts: of each row the line that `lorakit predict --file` writes, as JSON.

    For `Dataset.map_batches`, which makes one in each of its actors, and for Spark, which makes one in each task.
    """

    def __init__(self, run: str, text: str = "text", pair: str | None = None) -> None:
        self.predictor, self.text, self.pair = load(run), text, pair

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The batch with its answers."""
        import numpy as np

        pairs = None if self.pair is None else batch[self.pair].tolist()
        return {**batch, "answer": np.array(self.answers(batch[self.text].tolist(), pairs), object)}

    def answers(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[str]:
        """The answers to some texts, or pairs of them."""
        inputs = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        return [json.dumps(answer, ensure_ascii=False) for answer in self.predictor.predict(inputs)]


def score_on_ray(
    dataset: Any, run: str | Path, *, actors: int = 1, gpu: bool = False, batch_size: int = 4096, **columns: str
) -> Any:
    """A Ray dataset with the column `answer`; each actor holds the model once, on a GPU of its own where asked.

    Raises:
        ConfigError: Ray is not installed.
    """
    with _ray_needed():
        from ray.data import ActorPoolStrategy
    return dataset.map_batches(
        Scorer,
        fn_constructor_kwargs={"run": str(Path(run).absolute()), **columns},
        compute=ActorPoolStrategy(size=actors),
        num_gpus=1 if gpu else None,
        batch_size=batch_size,
    )


# Serving


def deployment(
    folders: Sequence[str | Path], *, replicas: int = 1, gpu: bool = False, token: str | None = None, memory: int = 1024
) -> Any:
    """The server of `lorakit serve` as an application of Ray Serve: `serve.run(deployment(["runs/reviews"]))`.

    A replica is ready once it has loaded its adapters. Ray's own proxy stands before it, so `token` is for those who may
    reach the proxy.

    Raises:
        ConfigError: Ray is not installed.
    """
    with _ray_needed():
        from ray import serve
    roots = [Path(folder).absolute() for folder in folders]

    def build() -> Any:
        from lorakit.app.server.routes import Service, create_app, find_all
        from lorakit.inference.adapter_pool import AdapterPool

        pool = AdapterPool(find_all(roots), limit_bytes=memory * MIB)
        for name in pool.folders:
            pool.load(name).result()
        return create_app(Service(pool, roots), token, ["*"])

    options = {"num_gpus": 1} if gpu else {}
    return serve.deployment(serve.ingress(build)(), num_replicas=replicas, ray_actor_options=options).bind()


@contextmanager
def _ray_needed() -> Iterator[None]:
    try:
        yield
    except ImportError as err:
        raise ConfigError(f"this needs {err.name or 'ray'}: pip install 'lorakit[ray]'") from err
