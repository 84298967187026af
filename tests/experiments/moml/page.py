"""Render the page and the picture of ``moml_protocol``."""

from collections.abc import Callable, Iterable, Sequence
from statistics import mean
from typing import Any

import numpy as np
from deploy.reports.report import as_png, style_axes
from online_meta.regret.ledger import MAIN_LEARNER
from tests.experiments.common.playing import TUNED
from tests.experiments.common.tables import COLOURS, Row, format_mean

NAME = "moml_protocol"
NAMES = {MAIN_LEARNER: "FTML", "moml": "MOML", "aruba": "ARUBA", "c_maml": "C-MAML", "ftl_fine_tune": "FTL, fine-tuned"}
"""Names on the page of learners whose label is different."""


def render(result: dict[str, Any]) -> str:
    """Return the page as Markdown: means over the seeds and their standard errors."""
    groups = group_by_label(result["rows"])
    leader = {row["asked"]["seed"]: row for row in groups.get(MAIN_LEARNER, [])}
    tuned = {TUNED: [{"asked": row["asked"], **row["tuned"]} for row in leader.values()]} if leader else {}
    text = [
        "# Digits under a thousand transformations: the protocol of MOML",
        "",
        f"`{result['command']}`, commit {result['commit']}.",
        "",
        f"{result['iterations']} tasks of `transformed_digits`: 60 support and 10 query images, under a",
        "transformation of their own; a perceptron 784-200-10, two inner steps. Per round, FTML and Reptile make",
        "two meta-steps on 5 tasks, MOML makes 10 on the new task, and ARUBA and C-MAML make one. Learners without",
        "an inner loop make six steps on 5 tasks. Mean over the seeds ± standard error. *CTM*: the current task,",
        "before it is learned. *LTM*: all tasks so far, adapted to from the current meta-parameters. *Against",
        f"FTML*: the difference in loss, seed by seed; below 0 is better. *{TUNED}*:",
        "FTML's leader, adapted with the 30 steps of Adam that *from scratch* makes instead of its own two: the value",
        "of the initialisation when both adapt in the same way.",
        "",
        "## The current task (CTM)",
        "",
        "| learner | seeds | loss | accuracy | against FTML | last half: loss | accuracy | against FTML |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {display_name(label)} | {' | '.join(_format_current(rows, leader))} |"
            for label, rows in {**groups, **tuned}.items()
        ),
        "",
        "## All tasks so far (LTM): loss; accuracy",
        "",
        *_format_long_term(groups, leader),
        "",
        "## Cost",
        "",
        "*State* is the size of what `save()` returns, including the optimizer's state. *Past* is the size of the",
        "tasks that replay needs. Seconds are CPU seconds for scoring and learning.",
        "",
        "| learner | state, MB | past, MB | seconds per round | inner rate | outer rate | options |",
        "|---|---|---|---|---|---|---|",
        *(f"| {display_name(label)} | {' | '.join(_format_cost(rows))} |" for label, rows in groups.items()),
        "",
        "Rates and options are the best of nine candidates per learner, over 150 rounds on another seed (`python -m",
        "tests.experiments.moml.tuning`). The authors chose those of *train on everything* and *from scratch*. All",
        "runs together took",
        f"{sum(row['seconds'] + row['checking'] for row in result['rows']):,.0f} seconds of one core.",
        "",
        f"![Running mean of the loss on the current task, and loss on all tasks so far]({NAME}.png)",
        "",
    ]
    return "\n".join(text)


def group_by_label(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Group the rows by learner, with the seeds in order."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: int(row["asked"]["seed"])):
        found.setdefault(row["asked"]["label"], []).append(row)
    return found


def display_name(label: str) -> str:
    """Return the name of a learner on the page."""
    return NAMES.get(label, label.replace("_", " "))


def _format_current(rows: list[Row], leader: dict[int, Row]) -> list[str]:
    cells = [str(len(rows))]
    for part in (mean, _mean_last_half):
        cells += [_format(part(row["losses"]) for row in rows), _format(part(row["accuracies"]) for row in rows)]
        cells.append(_format_difference(rows, leader, lambda row, part=part: part(row["losses"])))  # type: ignore[misc]
    return cells


def _mean_last_half(values: Sequence[float]) -> float:
    return mean(values[len(values) // 2 :])


def _format_long_term(groups: dict[str, list[Row]], leader: dict[int, Row]) -> list[str]:
    rounds = [check["rounds"] for check in next(iter(groups.values()))[0]["long_term"]]
    lines = [
        f"| learner | {' | '.join(f'{count} tasks' for count in rounds)} | against FTML |",
        "|---" * (len(rounds) + 2) + "|",
    ]
    for label, rows in groups.items():
        checks = zip(*(row["long_term"] for row in rows), strict=True)
        cells = ["; ".join(_format(check[of] for check in seeds) for of in ("loss", "accuracy")) for seeds in checks]
        cells.append(_format_difference(rows, leader, lambda row: float(row["long_term"][-1]["loss"])))
        lines.append(f"| {display_name(label)} | {' | '.join(cells)} |")
    return lines


def _format_cost(rows: list[Row]) -> list[str]:
    chosen = rows[0]["asked"]["chosen"]
    return [
        *(f"{rows[0][of] / 1e6:.2f}" for of in ("state_bytes", "past_bytes")),
        _format((row["seconds"] / len(row["losses"]) for row in rows), ".4f"),
        str(chosen["inner"]),
        str(chosen["outer"]),
        ", ".join(f"{name} {value}" for name, value in chosen["options"].items()),
    ]


def _format_difference(rows: list[Row], leader: dict[int, Row], found: Callable[[Row], float]) -> str:
    """Return the mean difference of ``found`` between the rows and the leader's rows with the same seeds."""
    pairs = [(row, leader[row["asked"]["seed"]]) for row in rows if row["asked"]["seed"] in leader]
    return _format((found(mine) - found(other) for mine, other in pairs if mine is not other), "+.3f")


def _format(values: Iterable[float], form: str = ".3f") -> str:
    return format_mean(values, form, none="")


def plot(rows: Sequence[Row]) -> bytes:
    """Return a PNG: by round, the running mean of the loss on the current task, and the loss on all tasks so far."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), dpi=110, layout="constrained")
    current, past = figure.subplots(1, 2, sharey=True)
    for (label, found), colour in zip(group_by_label(rows).items(), (*COLOURS, "#000000", "#888888"), strict=False):
        losses = np.mean([row["losses"] for row in found], axis=0)
        rounds = np.arange(1, len(losses) + 1)
        current.plot(rounds, np.cumsum(losses) / rounds, color=colour, label=display_name(label))
        checks = np.mean([[[check["rounds"], check["loss"]] for check in row["long_term"]] for row in found], axis=0)
        past.plot(*checks.T, "o-", color=colour, markersize=4, label=display_name(label))
    current.set_title("CTM: mean loss on the current tasks so far", fontsize=11)
    past.set_title("LTM: mean loss on all tasks so far", fontsize=11)
    for axes in (current, past):
        axes.set_xlabel("round")
        style_axes(axes)
    current.set_ylabel("query loss after adaptation")
    current.set_ylim(0, 2.6)
    past.legend(frameon=False, fontsize=9)
    return as_png(figure)
