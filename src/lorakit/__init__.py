"""Lorakit: LoRA fine-tuning from scratch, from a file of labelled text to an honest score and an adapter that ships.

run = lorakit.train(model={"base": "minilm"}, data={"train": "reviews.csv"}, output={"dir": "runs/reviews"})
lorakit.load("runs/reviews").predict(["What a film!"])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorakit.app.api import train as train
    from lorakit.app.estimators import EntityRecognizer as EntityRecognizer
    from lorakit.app.estimators import TextClassifier as TextClassifier
    from lorakit.app.estimators import TextRegressor as TextRegressor
    from lorakit.data.read import register_reader as register_reader
    from lorakit.inference.predictor import load as load
    from lorakit.task_info import register_task as register_task

__version__ = "0.1.0"
__all__ = [
    "EntityRecognizer",
    "TextClassifier",
    "TextRegressor",
    "__version__",
    "load",
    "register_reader",
    "register_task",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import functions and estimators on first use: `import lorakit.lora` needs only torch and safetensors."""
    if name == "train":
        from lorakit.app.api import train

        return train
    if name == "load":
        from lorakit.inference.predictor import load

        return load
    if name == "register_reader":
        from lorakit.data.read import register_reader

        return register_reader
    if name == "register_task":
        from lorakit.task_info import register_task

        return register_task
    if name in __all__:
        from lorakit.app import estimators

        return getattr(estimators, name)
    raise AttributeError(f"module 'lorakit' has no attribute {name!r}")
