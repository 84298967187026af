"""Render the table of the pool as Markdown and as a picture."""

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from deploy.reports.report import as_png, style_axes
from online_meta.regret.ledger import MAIN_LEARNER
from tests.experiments.common.tables import COLOURS, Row, format_mean, mean_and_error
from tests.experiments.pool.runs import DEFAULTS_ONLY, START
from tests.experiments.pool.streams import STREAMS
from trainers.learner_settings import POOL

NAME = "pool"
SHOWN = 8
"""Answers of a stream's table, the pools not counted."""
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""The factor of the standard error in an interval of 95 %, by the number of seeds (Student's t)."""


class Goal(NamedTuple):
    """A goal of a stream.

    Attributes:
        text: what it says.
        value: what is compared, of the row of a seed.
        most: what it is at most.
        form: the format of both.
    """

    text: str
    value: Any
    most: float
    form: str = ".3f"


def find_best(row: Row, part: str) -> str:
    """Return the answer of an expert with the least loss in hindsight, by the ``part`` "mean" or "late" of a row."""
    losses: dict[str, float] = row[part]
    return min((name for name in losses if name not in (POOL, DEFAULTS_ONLY)), key=losses.__getitem__)


def compute_ratio(row: Row) -> float:
    """Return the loss of the pool from round ``START`` on, divided by that of the best expert in hindsight."""
    return float(row["late"][POOL] / row["late"][find_best(row, "late")])


def _above_best(row: Row) -> float:
    return float(row["mean"][POOL] - row["mean"][find_best(row, "mean")])


def _against_ftml(row: Row) -> float:
    return float(row["mean"][POOL] / row["mean"][MAIN_LEARNER])


def _above_static(row: Row) -> float:
    return float(row["mean"][POOL] - row["static"])


def list_goals(stream: str) -> list[Goal]:
    """Return the goals of a stream."""
    level = Goal(f"from round {START} on, pool / best expert", compute_ratio, 1.03)
    if stream == "moml":
        return [
            Goal("pool minus best expert, a round", _above_best, 0.005, "+.4f"),
            Goal("loss of the pool, a round", lambda row: row["mean"][POOL], 0.91),
        ]
    if stream in ("drifting", "recurring", "heavy-tailed"):
        level = level._replace(most=1.1 if stream == "heavy-tailed" else 1.03)
        return [level, Goal("pool / FTML with uniform replay", _against_ftml, 0.7)]
    if STREAMS[stream].static:
        return [level, Goal("pool minus best fixed start in hindsight, a round", _above_static, 0.0, "+.4f")]
    return [level]


RIVALS = {
    "pooled linear": "pooled_ridge",
    "linear, per entity": "ridge_head",
    "mixed effects": "hierarchical_bayes",
    "gradient boosting": "gradient_boosting",
}
"""What the pool is compared with on the streams that were held out."""


def render(result: dict[str, Any]) -> str:
    """Return the page as Markdown."""
    groups = group_by_stream(result["rows"])
    goals = [line for stream, rows in groups.items() for line in _format_goals(stream, rows)]
    held_out = {stream: rows for stream, rows in groups.items() if "gradient_boosting" in rows[0]["mean"]}
    return "\n".join(
        [
            _introduce(result),
            "| stream | rounds | seeds | goal | at most | measured | |",
            "|---|---|---|---|---|---|---|",
            *goals,
            "",
            *(_render_rivals(held_out) if held_out else []),
            *(line for stream, rows in groups.items() for line in _render_stream(stream, rows)),
            f"![Mean loss of the pool so far, divided by that of FTML and of the best expert]({NAME}.png)",
            "",
        ]
    )


def group_by_stream(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group the rows by stream, with the seeds in order."""
    found = {
        name: sorted((row for row in rows if row["asked"]["stream"] == name), key=lambda row: int(row["asked"]["seed"]))
        for name in STREAMS
    }
    return {name: some for name, some in found.items() if some}


def _introduce(result: dict[str, Any]) -> str:
    return f"""# The pool, next to its experts

`{result["command"]}`, commit {result["commit"]}.

The loss of the pool and of all its experts, on the tasks of the tables of single learners; each task is scored by all
before it is learned by any. An *expert* is an answer of a learner: `ftml@10` is FTML's after 10 inner steps, and
`ftml@adam30` that after 30 steps of Adam. The *best expert* is the one with the least loss of the seed in hindsight.
The pool is that of a run's defaults: Bayes' rule for cross-entropy, *tracking* for squared losses. *{DEFAULTS_ONLY}* is
a second pool, of the learners that play by default: FTML, from scratch, three closed forms and the hierarchical model.
Measured is the mean over the seeds ± standard error. A goal *holds* if it holds for the mean over the seeds; *in all*
says that it holds for each of them. That squared losses are mixed by *tracking* was decided on seeds 100 and 101 of
schools, drifting and heavy-tailed, which are not in the table.

On MOML's protocol the learners are those of [its table](moml_protocol.md) with the same settings, but for MOML, online
Reptile, *FTL, fine-tuned* and *train on everything*, which were left out for their cost.
Its runs are those of commit fb834b1.
On regression streams they are the best of [that table](regression_streams.md), with its settings. On streams that are
not stationary they are FTML with uniform replay, with that of the newest rounds and with 18 meta-steps a round, and the
mixture of [that table](non_stationary.md).
"""


def _format_goals(stream: str, rows: list[Row]) -> Iterable[str]:
    for goal in list_goals(stream):
        values = [goal.value(row) for row in rows]
        met = [value <= goal.most for value in values]
        verdict = f"holds{', in all' if all(met) else ''}" if fmean(values) <= goal.most else "**falls short**"
        cells = [stream, _rounds(rows), str(len(rows)), goal.text, f"{goal.most:{goal.form}}"]
        yield f"| {' | '.join([*cells, format_mean(values, goal.form), verdict])} |"


def _rounds(rows: list[Row]) -> str:
    return str(min(row["asked"]["rounds"] for row in rows))


def _render_rivals(streams: dict[str, list[Row]]) -> list[str]:
    """Return the table of the streams that were held out: paired differences of the pools to their rivals."""
    text = [
        "## Held out from all choices",
        "",
        "Loss of the pool minus that of another answer, a round, paired by seed, with an interval of 95 % (Student's",
        "t over the seeds); below 0, the pool is ahead. The pool is that of all that play; the other one has neither",
        "the mixed-effects model nor gradient boosting among its experts. Gradient boosting is scikit-learn's",
        "`HistGradientBoostingRegressor`, fitted in each round to all rows so far; the mixed-effects model is",
        "`hierarchical_bayes`. *Level* means that the interval contains 0. No setting of a learner was chosen on these",
        "streams. The pupils had been played with AdaHedge before *tracking* was chosen on other streams.",
        "",
        "| stream | against | its loss | pool minus it | | default experts minus it | |",
        "|---|---|---|---|---|---|---|",
    ]
    for stream, rows in streams.items():
        for title, name in {**RIVALS, "FTML": MAIN_LEARNER}.items():
            cells = [stream, title, format_mean([row["mean"][name] for row in rows], ".4f")]
            for pool in (POOL, DEFAULTS_ONLY):
                cells += _compare([row["mean"][pool] - row["mean"][name] for row in rows])
            text.append(f"| {' | '.join(cells)} |")
    return [*text, ""]


def _compare(differences: list[float]) -> list[str]:
    found = mean_and_error(differences)
    mean, error = found["mean"], found["error"]
    assert mean is not None
    if error is None:
        return [f"{mean:+.4f}", "one seed"]
    width = error * T_95[len(differences)]
    said = "level" if abs(mean) <= width else "ahead" if mean < 0 else "**behind**"
    return [f"{mean:+.4f} ± {width:.4f}", said]


def _render_stream(stream: str, rows: list[Row]) -> list[str]:
    means = {name: fmean(row["mean"][name] for row in rows) for name in rows[0]["mean"]}
    pools = [name for name in (POOL, DEFAULTS_ONLY) if name in means]
    experts = sorted((name for name in means if name not in pools), key=means.__getitem__)
    kept = [*pools, *experts[:SHOWN], *(name for name in (MAIN_LEARNER,) if name not in experts[:SHOWN])]
    text = [
        f"## {STREAMS[stream].about}",
        "",
        _describe(rows, len(experts)),
        "",
        f"| answer | loss | from round {START} on | weight at the end |",
        "|---|---|---|---|",
    ]
    for name in kept:
        cells = [format_mean([row[part][name] for row in rows], ".4f") for part in ("mean", "late")]
        weight = "" if name in pools else format_mean([row["weights"][POOL].get(name, 0.0) for row in rows], ".2f")
        text.append(f"| {name} | {' | '.join(cells)} | {weight} |")
    static = [row["static"] for row in rows if row["static"] is not None]
    text += [f"| best fixed start in hindsight | {format_mean(static, '.4f')} | | |"] if static else []
    return [*text, ""]


def _describe(rows: list[Row], experts: int) -> str:
    pool, every = (
        [1000 * row["seconds"][POOL] for row in rows],
        [1000 * sum(row["seconds"].values()) for row in rows],
    )
    regret, bound = ([row["regret"][part] for row in rows] for part in ("regret", "bound"))
    return f"""{_rounds(rows)} rounds, {experts} experts. CPU milliseconds a round: {format_mean(every, ".0f")};
of these, {format_mean(pool, ".1f")} are the pool's own. Its regret at the end is {format_mean(regret, ".2f")}, and
the bound {format_mean(bound, ".2f")}, both of losses as it counts them."""


def plot(rows: Sequence[Row]) -> bytes:
    """Return a PNG: for each stream, the mean loss so far of the pool, divided by the final one of the best expert."""
    from matplotlib.figure import Figure

    groups = group_by_stream(rows)
    figure = Figure(figsize=(10, 4.4), dpi=110, layout="constrained")
    axes = figure.subplots()
    for at, (stream, some) in enumerate(groups.items()):
        shortest = min(len(row["curve"]) for row in some)
        curves = [np.array(row["curve"][:shortest]) / row["mean"][find_best(row, "mean")] for row in some]
        shares = np.linspace(0, 1, shortest + 1)[1:]
        axes.plot(shares, np.mean(curves, 0), color=COLOURS[at % len(COLOURS)], ls=("-", "--")[at // 6], label=stream)
    axes.axhline(1.0, color="#888888", lw=0.8)
    axes.set_ylim(0.8, 2.0)
    axes.set_xlabel("share of the rounds")
    axes.set_ylabel("mean loss of the pool so far / best expert at the end")
    axes.legend(frameon=False, fontsize=8, ncols=2)
    style_axes(axes)
    return as_png(figure)
