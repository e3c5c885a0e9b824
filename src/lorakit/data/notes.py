"""What a reader tells the user besides the records: never more than a line a kind."""

from __future__ import annotations

from collections.abc import Sequence

MOST = 5  # places that a note lists


def counted(what: str, places: Sequence[str]) -> list[str]:
    """The note `what: how many (the first places)`, or none where there is no place."""
    if not places:
        return []
    more = ", ..." if len(places) > MOST else ""
    return [f"{what}: {len(places)} ({', '.join(places[:MOST])}{more})"]
