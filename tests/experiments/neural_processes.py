"""Neural processes on samples of a Gaussian process, in nats above the exact answer."""

from dataclasses import replace
from functools import partial
from statistics import fmean

from tests.experiments.beliefs.neural import list_processes
from tests.experiments.beliefs.page import Bar, cover
from tests.experiments.beliefs.runs import Contestant
from tests.experiments.beliefs.table import Table, make_command, render_table
from tests.experiments.common.tables import Row

SIZES = ("engine.pad_sizes=[10, 20]",)
"""Tasks have 3 to 10 support samples, and one recorded program computes all of them."""

RATES = {"cnp": 0.002, "np": 0.002, "attentive": 0.001, "transformer": 0.001}
"""The rates of the meta-optimizer. Those of cnp and attentive were the better of two on another seed."""

CONTESTANTS = {
    "maml": Contestant("MAML, noise from the model", ("inner.rule=sgd", *SIZES)),
    **{
        name: replace(one, changes=(*one.changes, f"meta.lr={RATES[name]}"))
        for name, one in list_processes(*SIZES).items()
    },
}
"""The learners of the table, by name."""


def _cover(rows: dict[str, Row]) -> float:
    return cover(rows["cnp"], 0.9)


def _nll(rows: dict[str, Row]) -> float:
    return fmean(rows["cnp"]["nll"])


def _excess(rows: dict[str, Row]) -> float:
    return fmean(rows["attentive"]["excess"])


BARS = [
    Bar("cnp", "coverage of 90 % intervals", 0.87, 0.93, _cover),
    Bar("cnp", "negative log-likelihood, nats", None, 1.0, _nll),
    Bar("attentive", "nats above the exact Gaussian process", None, 0.30, _excess),
]
TABLE = Table(
    "neural_processes",
    "Samples of a Gaussian process: amortised learners against the exact answer",
    [
        "A task is a sample of a Gaussian process, of which some noisy points are known. The exact answer is the",
        "Gaussian process itself. Every learner is FTML on the stream: each round brings a task, and a meta-step on 16",
        "tasks of the past follows. At the end it answers the same 200 tasks, which no run has learned.",
    ],
    "gp_regression",
    2500,
    CONTESTANTS,
    BARS,
)
render = partial(render_table, TABLE)

if __name__ == "__main__":
    make_command(TABLE)()
