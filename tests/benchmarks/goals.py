"""Compare figures with their goals, and format the verdicts."""

from collections.abc import Mapping
from typing import Any

Rows = Mapping[str, Mapping[str, Any]]
"""The rows of a workload by contestant; a row with a reason under ``failed`` has no figures."""

NAMES = {"seconds": "time", "bytes": "memory"}


def compute_ratio(rows: Rows, contestant: str, measure: str, peer: str) -> float | None:
    """Return the ratio of the contestant's time or memory to the peer's; None if either is missing."""
    pair = [rows.get(name, {"failed": "absent"}) for name in (contestant, peer)]
    if any("failed" in row or not row.get(measure) for row in pair):
        return None
    return float(pair[0][measure]) / float(pair[1][measure])


def format_verdict(found: float | None, most: float) -> str:
    """Return "met", or by what factor the goal is missed."""
    if found is None:
        return "not measured"
    return "met" if found <= most else f"**missed**: {found / most:.2f} times the goal"


def format_goal_lines(work: Mapping[str, Any]) -> list[str]:
    """Return a table line for each goal of a workload."""
    rows = {row["contestant"]: row for row in work["rows"]}
    lines = []
    for goal in work["goals"]:
        found = compute_ratio(rows, goal["contestant"], goal["measure"], goal["peer"])
        value = "-" if found is None else f"{found:.3g}"
        what = f"{NAMES[goal['measure']]} of {goal['contestant']} / {goal['peer']}"
        lines.append(f"| {what} | {value} | {goal['most']:g} | {format_verdict(found, goal['most'])} |")
    return lines
