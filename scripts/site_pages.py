"""What mkdocs is told besides mkdocs.yml: every page that the navigation does not name is put where it belongs.

Decisions are listed from docs/adr; a page right under docs/ that is new goes to "In depth".
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


def on_config(config: Any) -> Any:
    """The navigation with all pages in it."""
    docs = Path(config.docs_dir)
    named = set(re.findall(r"[\w./-]+\.md", str(config.nav)))
    for entry in config.nav:
        if isinstance(entry, dict) and "Decisions" in entry:
            entry["Decisions"] = sorted(str(page.relative_to(docs)) for page in docs.glob("adr/*.md"))
        if isinstance(entry, dict) and "In depth" in entry:
            entry["In depth"] += sorted(page.name for page in docs.glob("*.md") if page.name not in named)
    return config
