"""Reading the word lists beside this file and the bundled training sentences."""

from __future__ import annotations

import csv
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "src" / "lorakit" / "demo"


def read_sections(path: Path, separator: str | None = None) -> dict[str, list[str]]:
    """Read ``[section]`` headings followed by items, one a line or split at ``separator``."""
    sections: dict[str, list[str]] = {}
    current: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        line = line.strip()
        if not line or line.startswith("# "):
            continue
        if re.fullmatch(r"\[@?\w+\]", line):
            current = sections.setdefault(line[1:-1], [])
        elif separator is None:
            current.append(line)
        else:
            current.extend(item.strip() for item in line.split(separator) if item.strip())
    return sections


def read_unlabelled() -> list[str]:
    """The bundled training sentences without any of their labels."""
    blocks = (DATA / "entities-train.conll").read_text(encoding="utf-8").strip().split("\n\n")
    sentences = [" ".join(line.split("\t")[0] for line in block.splitlines()) for block in blocks]
    with (DATA / "reviews-train.csv").open(encoding="utf-8", newline="") as stream:
        sentences += [row["text"] for row in csv.DictReader(stream)]
    return sentences


def fragments(prose: list[str]) -> list[str]:
    """Runs of three to nine lower-case words of real sentences: natural wording without a name."""
    found: list[str] = []
    for sentence in prose:
        tokens = re.findall(r"'s|n't|[\w'-]+|[^\w\s]", sentence)
        run: list[str] = []
        for token in [*tokens, "."]:
            if token[0].islower() or (run and token == ","):
                run.append(token)
                continue
            found.extend(" ".join(run[at : at + 9]).strip(" ,") for at in range(0, len(run) - 2, 6))
            run = []
    return [run for run in found if len(run.split()) >= 3]


def plural(noun: str) -> str:
    """A regular plural, good enough for filler."""
    if noun.endswith("y") and noun[-2] not in "aeou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")
