"""Draw docs/images/architecture.svg and its narrow form for phones: the quickstart's classifier with LoRA on query and value.

    python scripts/pictures.py

The model is loaded and adapted as by `lorakit train` (extra: minilm), which draws the narrow form for each run.
"""

from __future__ import annotations

from pathlib import Path

from lorakit.app.commands.quickstart import SENTIMENT
from lorakit.app.report.architecture import architecture
from lorakit.recipe import make_recipe
from lorakit.training.prepare import prepare

IMAGES = Path(__file__).parents[1] / "docs/images"

if __name__ == "__main__":
    lora = {**SENTIMENT["lora"], "target_modules": ["query", "value"]}
    ready = prepare(make_recipe({**SENTIMENT, "lora": lora}, where="pictures"))
    for name, wide in (("architecture.svg", True), ("architecture-phone.svg", False)):
        title = "MiniLM, LoRA on query and value"
        (IMAGES / name).write_text(architecture(ready.model, title, ready.adapter, ready.config, wide=wide))
