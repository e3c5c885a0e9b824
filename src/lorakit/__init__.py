"""Lorakit: LoRA fine-tuning from scratch, from a file of labelled text to an honest score and an adapter that ships.

result = lorakit.train(model="minilm", data="reviews.csv", folder="runs/reviews")
lorakit.load("runs/reviews").predict("What a film!")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorakit.app.api import train as train
    from lorakit.app.estimators import EntityRecognizer as EntityRecognizer
    from lorakit.app.estimators import TextClassifier as TextClassifier
    from lorakit.app.estimators import TextEmbedder as TextEmbedder
    from lorakit.app.estimators import TextRegressor as TextRegressor
    from lorakit.data.formats import register_reader as register_reader
    from lorakit.errors import LorakitError as LorakitError
    from lorakit.inference.predictor import Predictor as Predictor
    from lorakit.inference.predictor import load as load
    from lorakit.task_info import register_task as register_task
    from lorakit.training.results import Result as Result

__version__ = "0.1.0"
PLACES = {  # of the public names: each is imported when it is first used, so that `import lorakit.lora` needs no more than torch
    "EntityRecognizer": "lorakit.app.estimators",
    "LorakitError": "lorakit.errors",
    "Predictor": "lorakit.inference.predictor",
    "Result": "lorakit.training.results",
    "TextClassifier": "lorakit.app.estimators",
    "TextEmbedder": "lorakit.app.estimators",
    "TextRegressor": "lorakit.app.estimators",
    "load": "lorakit.inference.predictor",
    "register_reader": "lorakit.data.formats",
    "register_task": "lorakit.task_info",
    "train": "lorakit.app.api",
}
__all__ = [
    "EntityRecognizer",
    "LorakitError",
    "Predictor",
    "Result",
    "TextClassifier",
    "TextEmbedder",
    "TextRegressor",
    "__version__",
    "load",
    "register_reader",
    "register_task",
    "train",
]


def __dir__() -> list[str]:
    return sorted(__all__)


if not TYPE_CHECKING:  # which would take any name for one of ours

    def __getattr__(name):
        if name not in PLACES:
            raise AttributeError(f"module 'lorakit' has no attribute {name!r}")
        return getattr(import_module(PLACES[name]), name)
