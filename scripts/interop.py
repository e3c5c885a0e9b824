"""Run the matrix of interchange with peft and write it as a document: python scripts/interop.py --out docs/interop.md

Offline, on tiny random models; needs the test dependencies. Ends with code 1 if a cell fails without an explanation.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import peft
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from tests.interop import families  # noqa: E402
from tests.interop.architectures import ARCHITECTURES  # noqa: E402
from tests.interop.matrix import CHECKS, TOLERANCE, VARIANTS, Outcome, run_cell  # noqa: E402
from tests.runs import write_choices, write_entities, write_reviews  # noqa: E402

from lorakit.lora import speedups  # noqa: E402
from lorakit.lora.target_presets import PRESETS  # noqa: E402

Cells = Mapping[tuple[str, str], Mapping[str, Outcome]]  # (architecture, variant) -> check -> outcome

VERSIONS = ", ".join(f"{lib.__name__} {lib.__version__.partition('+')[0]}" for lib in (peft, transformers, torch))
INTRO = f"""# Adapters to and from peft

Written by `python scripts/interop.py --out docs/interop.md` ({VERSIONS}),
on tiny random models and without a network. `tests/interop` runs part of it with the other tests, and all of it with
`LORAKIT_INTEROP=all`. On transformers 5.24.0 and torch 2.14.1 that part gives the same results (2026-11-30). There peft 0.21.2
refuses nothing more, but `add_adapter` of transformers and sentence-transformers needs peft 0.22, which has not been released.

Each cell is one architecture with one variant of LoRA. It stands for five checks:

{{checks}}

| sign | meaning |
|---|---|
| `=` | every check passes, with differences of exactly 0 |
| `~` | every check passes, with differences of at most {TOLERANCE:g} (of the largest value, if that is above 1); Near says why |
| `differs` | no check passes |
| `n/a` | the variant cannot be applied to this model |
| `[n]` | a check cannot be applied here, or does not pass for a reason that the command has verified; see Notes |

"""


def main() -> int:
    """Run the cells, write the document, and tell whether every cell is explained."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="the Markdown file; standard output without it")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="run this one alone (may be repeated)")
    parser.add_argument("--architecture", action="append", choices=ARCHITECTURES, help="run this one alone")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--only", choices=("peft", "families"), help="write this half of the document alone")
    asked = parser.parse_args()
    names = [(a, v) for a in asked.architecture or ARCHITECTURES for v in asked.variant or VARIANTS]
    cells = run(names, run_one, asked.jobs) if asked.only != "families" else {}
    of_families = run(families.cells(), run_family, asked.jobs) if asked.only != "peft" else {}
    text = "\n".join(part(found) for part, found in ((document, cells), (family_document, of_families)) if found)
    if asked.out:
        asked.out.write_text(text, encoding="utf-8")
    else:
        print(text)
    every = [*cells.values(), *of_families.values()]
    return int(any(outcome.status == "FAIL" for outcomes in every for outcome in outcomes.values()))


def run(names: list[tuple[str, str]], one: Callable[[tuple[str, str]], Mapping[str, Outcome]], jobs: int) -> Cells:
    """Every cell named, told on standard error while it runs."""
    cells = {}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=be_quiet) as pool:
        for name, outcomes in zip(names, pool.map(one, names), strict=True):
            cells[name] = outcomes
            print(f"{name[0]:20} {name[1]:16}", *(o.status for o in outcomes.values()), file=sys.stderr, flush=True)
            for check, outcome in outcomes.items():
                if outcome.status == "FAIL":
                    print(f"    {check}: {outcome.reason}", file=sys.stderr, flush=True)
    return cells


def be_quiet() -> None:
    """No warnings and bars from peft and transformers, which tell of layers that the adapter then fills."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def run_one(name: tuple[str, str]) -> Mapping[str, Outcome]:
    """One cell in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return run_cell(*name, Path(folder))


def run_family(name: tuple[str, str]) -> Mapping[str, Outcome]:
    """One cell of the families in a folder of its own, with data of its own."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        for part, n in (("train", 12), ("validation", 4)):
            write_reviews(data / f"{part}.csv", n)
            write_entities(data / f"{part}.conll", n)
            write_choices(data / f"{part}.choices.csv", n)
        return families.run_family(*name, data, data / "models")


FAMILIES = f"""## Families

Every family of transformers that has a class for one of these tasks, as a tiny random model with a tokenizer of words.
There are five checks:

{{checks}}

`~`: every check passes, within {families.TOLERANCE:g} of the largest number. `refused`: we refuse the model before anything is
written, with an error that says why. `n/a`: not tried. `-`: transformers has no such class. {{counts}}

`presets`: `lora.target_modules` can be `query-value` or `attention`; for other families use a list of names or `all-linear`.
`last block`: a classifier computes the last block for the first token only; for other families it computes all of it.
"""


def family_document(cells: Cells) -> str:
    """The families as Markdown, one row each."""
    notes: dict[str, int] = {}
    rows = [
        [
            name,
            *(sign(cells[name, kind], notes) if (name, kind) in cells else "-" for kind in families.KINDS),
            "yes" if name in PRESETS else "-",
            "first token" if name in {*speedups.LIKE_BERT, *speedups.FAMILIES} else "-",
        ]
        for name in dict.fromkeys(family for family, _ in cells)
    ]
    table = markdown(["", *families.KINDS, "presets", "last block"], rows)
    ends = [min({o.status for o in cell.values()} - {"pass"}, default="pass") for cell in cells.values()]
    words = {"pass": "pass", "differs": "differ, explained", "refused": "refused", "n/a": "n/a", "FAIL": "unexplained"}
    told = ", ".join(f"{ends.count(status)} {word}" for status, word in words.items())
    checks = "\n".join(f"- **{name}**: {check.__doc__}" for name, check in families.FAMILY_CHECKS.items())
    counts = f"Of {len(cells)} cells: {told}."
    return "\n\n".join([FAMILIES.format(checks=checks, counts=counts) + "\n" + table, numbered(notes)]) + "\n"


def document(cells: Cells) -> str:
    """The matrix as Markdown."""
    notes: dict[str, int] = {}
    table = grid(cells, notes)  # fills the notes
    checks = "\n".join(f"- **{name}**: {(check.__doc__ or '').strip()}" for name, check in CHECKS.items())
    parts = [INTRO.format(checks=checks) + table, "## Notes", numbered(notes), "## Near", near(cells)]
    return "\n\n".join([*parts, "## Counts", counts(cells)]) + "\n"


def grid(cells: Cells, notes: dict[str, int]) -> str:
    """One row an architecture, one column a variant."""
    variants = list(dict.fromkeys(variant for _, variant in cells))
    rows = [[name, *(sign(cells[name, v], notes) for v in variants)] for name in dict.fromkeys(a for a, _ in cells)]
    return markdown(["", *variants], rows)


def sign(outcomes: Mapping[str, Outcome], notes: dict[str, int]) -> str:
    """A cell in a few characters; what needs words is added to the notes."""
    found = []
    for check, outcome in outcomes.items():
        if outcome.reason:
            where = "" if all(o == outcome for o in outcomes.values()) else f"**{check}**: "
            number = notes.setdefault(where + outcome.reason, len(notes) + 1)
            found.append(f"[{number}]")
    status = {outcome.status for outcome in outcomes.values()}
    passed = "~" if any(outcome.difference for outcome in outcomes.values()) else "="
    status = {"FAIL", "pending"} & status or status - {"n/a"} or status
    mark = passed if "pass" in status else min(status)
    return " ".join([mark, *dict.fromkeys(found)])


def numbered(notes: Mapping[str, int]) -> str:
    """The notes as a list."""
    return "\n".join(f"{number}. {note}." for note, number in notes.items())


def near(cells: Cells) -> str:
    """The largest difference of each variant that is not exact, and why it is not."""
    rows = []
    for name, variant in VARIANTS.items():
        worst = max((o.difference for (_, v), cell in cells.items() if v == name for o in cell.values()), default=0)
        if worst:
            rows.append([name, f"{worst:.1e}", variant.near])
    return markdown(["variant", "largest difference", "why"], rows)


def counts(cells: Cells) -> str:
    """How the checks ended, by check."""
    rows = []
    for check in CHECKS:
        outcomes = [cell[check] for cell in cells.values()]
        exact = sum(o.status == "pass" and o.difference == 0 for o in outcomes)
        other = [sum(o.status == word for o in outcomes) for word in ("differs", "n/a", "pending", "FAIL")]
        rows.append([check, *map(str, (exact, sum(o.status == "pass" for o in outcomes) - exact, *other))])
    rows.append(["all", *(str(sum(int(row[i]) for row in rows)) for i in range(1, 7))])
    return markdown(["check", "equal", "near", "differs, explained", "n/a", "pending", "unexplained"], rows)


def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
