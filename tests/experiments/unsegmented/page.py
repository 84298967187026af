"""The page of the leader that starts from nothing on a stream without task boundaries."""

import math
from statistics import median
from typing import Any

from tests.experiments.common.tables import Row, tell_mean
from tests.experiments.segmentation import LEAST, MEAN_LENGTH, NOISE, WITHIN

NAME = "unsegmented"
BLOCK = 1_000
DAEMON = "its own cuts, as a daemon"
WAYS = ("its own cuts", DAEMON, "true boundaries", "cuts by linear, 50 waves", "cuts by count")


def render(result: dict[str, Any]) -> str:
    """Return the table as Markdown, a line for each way and block, the mean over its seeds ± standard error."""
    about = f"""# A leader from nothing on a stream without task boundaries

`{result["command"]}`, commit {result["commit"]}.

Streams of {result["iterations"]:,} samples of sinusoids as in [segmentation.md](segmentation.md): a task lasts {LEAST}
samples or more, {MEAN_LENGTH} on the mean; amplitude 0.1..5, phase 0..pi, noise {NOISE}. A network 1-40-40-1 from
random weights follows its leader (exact meta-gradients, Meta-SGD, three inner steps; ten meta-steps of Adam on up to 25
tasks a round) and learns one task for each segment, which is

- *its own cuts*: cut by the run length over the loss of the current leader (`online_meta.changepoints.task_free`);
- *{DAEMON}*: by the same, as `[[source]] likelihood = "leader"` has it. All of its samples are the task, half of
  them, drawn by chance, the query, and the leader learns to adapt to the whole other half;
- *true boundaries*: the task as it is. What is told of cuts is what this leader's loss would have found;
- *cuts by linear, 50 waves*: cut by the run length over a likelihood that knows what a task is like;
- *cuts by count*: {MEAN_LENGTH} samples each.

A change is found if one is told of that is at most {WITHIN} samples off; delay is of those that were found. Purity: the
share of samples that are of their segment's main task. *Own loss*: the median query loss, after adaptation, of the
tasks that were learned in the block, scored before. *Fresh loss*: mean loss of 100 whole tasks, never learned and
without noise, after adaptation to ten samples by the leader at the block's end. Mean over the seeds ± standard error.

| the leader learns | samples | delay, mean | missed, % | false in 1,000 | purity | own loss | fresh loss |
|---|---|---|---|---|---|---|---|
"""
    lines = []
    for way in WAYS:
        rows = [row for row in result["rows"] if row["asked"]["way"] == way]
        for place in range(len(rows[0]["blocks"]) if rows else 0):
            where = f"{place * BLOCK:,} to {(place + 1) * BLOCK:,}"
            lines.append(f"| {way} | {where} | {' | '.join(_cells([row['blocks'][place] for row in rows]))} |\n")
    return about + "".join(lines) + "\n" + _effort(result["rows"])


def _cells(blocks: list[Row]) -> list[str]:
    delays = [sum(block["delays"]) / len(block["delays"]) for block in blocks if block["delays"]]
    return [
        tell_mean(delays, ".1f"),
        tell_mean([100 * block["missed"] / block["changes"] for block in blocks if block["changes"]], ".0f"),
        tell_mean([1_000 * block["false_alarms"] / block["samples"] for block in blocks], ".1f"),
        tell_mean([block["purity"] for block in blocks], ".3f"),
        tell_mean([median(block["losses"]) for block in blocks if block["losses"]], ".2f"),
        tell_mean([block["fresh"] for block in blocks if math.isfinite(block["fresh"])], ".2f"),
    ]


def _effort(rows: list[Row]) -> str:
    told = []
    for way in WAYS:
        some = [row for row in rows if row["asked"]["way"] == way]
        if some:
            rounds = tell_mean([row["rounds"] for row in some], ".0f")
            told.append(f"{way} {rounds} and {tell_mean([row['seconds'] for row in some], '.0f')}")
    return f"Tasks that were learned, and the processor's seconds: {'; '.join(told)}.\n"
