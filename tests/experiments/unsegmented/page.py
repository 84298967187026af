"""Render the page of the leader that starts from random weights on a stream without task boundaries."""

import math
from statistics import median
from typing import Any

from tests.experiments.common.tables import Row, format_mean
from tests.experiments.segmentation import MEAN_LENGTH, MIN_LENGTH, NOISE, TOLERANCE

NAME = "unsegmented"
BLOCK = 1_000
DAEMON = "its own cuts, as a daemon"
WAYS = ("its own cuts", DAEMON, "true boundaries", "cuts by linear, 50 waves", "cuts by count")


def render(result: dict[str, Any]) -> str:
    """Return the table as Markdown: a line for each way and block, with the mean over its seeds ± standard error."""
    about = f"""# A leader from random weights on a stream without task boundaries

`{result["command"]}`, commit {result["commit"]}.

Streams of {result["iterations"]:,} samples of sinusoids as in [segmentation.md](segmentation.md). A task lasts at least
{MIN_LENGTH} samples, and {MEAN_LENGTH} on average; amplitude 0.1..5, phase 0..pi, noise {NOISE}. A network 1-40-40-1
with random initial weights follows its leader (exact meta-gradients, Meta-SGD, three inner steps; ten meta-steps of
Adam on up to 25 tasks per round). It learns one task for each segment. The segments are

- *its own cuts*: cut by run length, with the loss of the current leader (`online_meta.changepoints.task_free`);
- *{DAEMON}*: cut in the same way, by `[[source]] likelihood = "leader"`. The task has all
  samples of the segment: a random half is the query set, the other half the support set. The leader learns to adapt to
  the whole support set;
- *true boundaries*: the true tasks. The detection metrics are those that the loss of this leader would have given;
- *cuts by linear, 50 waves*: cut by run length, with a likelihood that fits the tasks;
- *cuts by count*: {MEAN_LENGTH} samples each.

A change counts as detected if a reported change lies within {TOLERANCE} samples of it; delays cover detected changes
only.
Purity is the share of samples that belong to the main task of their segment. *Own loss* is the median query loss after
adaptation over the tasks that were learned in the block; each task is scored before it is learned. *Fresh loss* is the
mean loss on 100 whole noise-free tasks that are never learned, after adaptation to ten samples from the leader at the
end of the block. Mean over the seeds ± standard error.

| the leader learns | samples | delay, mean | missed, % | false in 1,000 | purity | own loss | fresh loss |
|---|---|---|---|---|---|---|---|
"""
    lines = []
    for way in WAYS:
        rows = [row for row in result["rows"] if row["asked"]["way"] == way]
        for place in range(len(rows[0]["blocks"]) if rows else 0):
            where = f"{place * BLOCK:,} to {(place + 1) * BLOCK:,}"
            lines.append(f"| {way} | {where} | {' | '.join(_format_cells([row['blocks'][place] for row in rows]))} |\n")
    return about + "".join(lines) + "\n" + _format_effort(result["rows"])


def _format_cells(blocks: list[Row]) -> list[str]:
    delays = [sum(block["delays"]) / len(block["delays"]) for block in blocks if block["delays"]]
    return [
        format_mean(delays, ".1f"),
        format_mean([100 * block["missed"] / block["changes"] for block in blocks if block["changes"]], ".0f"),
        format_mean([1_000 * block["false_alarms"] / block["samples"] for block in blocks], ".1f"),
        format_mean([block["purity"] for block in blocks], ".3f"),
        format_mean([median(block["losses"]) for block in blocks if block["losses"]], ".2f"),
        format_mean([block["fresh"] for block in blocks if math.isfinite(block["fresh"])], ".2f"),
    ]


def _format_effort(rows: list[Row]) -> str:
    parts = []
    for way in WAYS:
        some = [row for row in rows if row["asked"]["way"] == way]
        if some:
            rounds = format_mean([row["rounds"] for row in some], ".0f")
            parts.append(f"{way} {rounds} and {format_mean([row['seconds'] for row in some], '.0f')}")
    return f"Number of tasks learned, and CPU seconds: {'; '.join(parts)}.\n"
