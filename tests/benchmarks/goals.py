"""Whether a goal is met, in one line that says by how much it is not."""

from collections.abc import Mapping
from typing import Any

Rows = Mapping[str, Mapping[str, Any]]
"""Rows of a work by contestant; one with a reason under ``failed`` counts for nothing."""

NAMES = {"seconds": "time", "bytes": "memory"}


def ratio(rows: Rows, contestant: str, measure: str, peer: str) -> float | None:
    """Return contestant's share of the peer's time or memory; None where either is missing."""
    pair = [rows.get(name, {"failed": "absent"}) for name in (contestant, peer)]
    if any("failed" in row or not row.get(measure) for row in pair):
        return None
    return float(pair[0][measure]) / float(pair[1][measure])


def verdict(found: float | None, most: float) -> str:
    """Return "met", or by what factor the goal is missed."""
    if found is None:
        return "not measured"
    return "met" if found <= most else f"**missed**: {found / most:.2f} times what it should be"


def goal_lines(work: Mapping[str, Any]) -> list[str]:
    """Return a line of a table for each goal of a work."""
    rows = {row["contestant"]: row for row in work["rows"]}
    lines = []
    for goal in work["goals"]:
        found = ratio(rows, goal["contestant"], goal["measure"], goal["peer"])
        told = "-" if found is None else f"{found:.3g}"
        what = f"{NAMES[goal['measure']]} of {goal['contestant']} / {goal['peer']}"
        lines.append(f"| {what} | {told} | {goal['most']:g} | {verdict(found, goal['most'])} |")
    return lines
