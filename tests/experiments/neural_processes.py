"""Neural processes on samples of a Gaussian process, in nats above the exact answer."""

from functools import partial
from statistics import fmean

from tests.experiments.beliefs.page import Bar, cover
from tests.experiments.beliefs.runs import Contestant
from tests.experiments.beliefs.table import Table, make_command, render_table
from tests.experiments.common.tables import Row

PROCESS = ("inner.rule=encode", "inner.steps=0", "inner.lr=0.001", "meta.lr=0.001")
CONTESTANTS = {
    "maml": Contestant("MAML, noise from the model", ("inner.rule=sgd",)),
    "cnp": Contestant(
        "conditional neural process",
        (*PROCESS, 'inner.fast=["context"]', "model.args={inputs=1, outputs=2, hidden=[64, 64], context=64}"),
    ),
    "np": Contestant(
        "neural process",
        (
            *PROCESS,
            "inner.options={latent=true}",
            'inner.fast=["context"]',
            "inner.posterior=samples",
            "inner.samples=10",
            "meta.gradient=variational",
            "model.args={inputs=1, outputs=2, hidden=[64, 64], context=16}",
        ),
    ),
    "attentive": Contestant(
        "attentive neural process",
        (
            *PROCESS,
            "inner.options={attention=true}",
            'inner.fast=["keys", "values"]',
            "model.build=trainers.models:attentive_decoder",
            "model.args={inputs=1, outputs=2, hidden=[64, 64], width=64}",
        ),
    ),
    "transformer": Contestant(
        "transformer neural process",
        (
            *PROCESS,
            "inner.options={in_context=true}",
            'inner.fast=["rows"]',
            "model.build=trainers.models:in_context_transformer",
            "model.args={inputs=1, outputs=2, width=32}",
        ),
    ),
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
        "Gaussian process itself. Every learner is FTML on the stream: each round brings a task, and five meta-steps",
        "on 16 tasks of the past follow. At the end it answers the same 200 tasks, which no run has learned.",
    ],
    "gp_regression",
    600,
    CONTESTANTS,
    BARS,
)
render = partial(render_table, TABLE)

if __name__ == "__main__":
    make_command(TABLE)()
