"""Bayesian meta-learners on functions that five noisy points leave open, in nats above the exact Bayes predictor."""

from collections.abc import Callable
from functools import partial
from statistics import fmean

from tests.experiments.beliefs.neural import list_processes
from tests.experiments.beliefs.page import Bar, cover
from tests.experiments.beliefs.runs import Contestant
from tests.experiments.beliefs.table import Table, make_command, render_table
from tests.experiments.common.tables import Row

SAMPLES = ("inner.posterior=samples", "inner.samples=10")
CONTESTANTS = {
    "maml": Contestant("MAML, fixed noise", ("inner.rule=sgd",)),
    "maml_learned_noise": Contestant(
        "MAML, noise from the model", ("model.loss=gaussian", "model.loss_options={}", "model.args.outputs=2")
    ),
    "llama": Contestant(
        "LLAMA",
        (
            "inner.rule=proximal",
            "inner.options={strength=2.0}",
            "inner.posterior=laplace",
            'inner.posterior_options={curvature="kron"}',
            "inner.samples=10",
            "meta.gradient=laplace",
            'meta.options={eta=1e-3, curvature="kron"}',
        ),
    ),
    "platipus": Contestant(
        "PLATIPUS",
        (
            "inner.rule=platipus",
            "inner.options={log_std=-1.0}",
            *SAMPLES,
            "meta.gradient=variational",
            "meta.options={kl_weight=0.1}",
        ),
    ),
    "abml": Contestant("ABML", ("inner.rule=bayes_by_gradient", *SAMPLES)),
    "abml_variational": Contestant(
        "ABML, bound of the paper",
        (
            "inner.rule=bayes_by_gradient",
            *SAMPLES,
            "meta.gradient=hierarchical_variational",
            "meta.options={hyperprior_weight=0.001}",
        ),
    ),
    "bmaml_chaser": Contestant(
        "BMAML, chaser",
        (
            "inner.rule=svgd",
            "inner.options={particles=5}",
            "inner.posterior=particles",
            "inner.samples=5",
            "meta.gradient=chaser",
            "meta.options={steps=1}",
        ),
    ),
    "bmaml_mixture": Contestant(
        "BMAML, loss of the mixture",
        (
            "inner.rule=svgd",
            "inner.options={particles=5, precision=0.01}",
            "inner.posterior=particles",
            "inner.samples=5",
        ),
    ),
    **list_processes(),
}
"""The learners of the table, by name."""


def _covers(name: str) -> Callable[[dict[str, Row]], float]:
    return lambda rows: cover(rows[name], 0.9)


def _gain(rows: dict[str, Row], name: str) -> float:
    return fmean(rows["maml"]["excess"]) - fmean(rows[name]["excess"])


BARS = [
    *(Bar(name, "coverage of 90 % intervals", 0.80, 0.97, _covers(name)) for name in ("llama", "platipus", "abml")),
    Bar("llama", "nats below MAML with fixed noise", 1.0, None, partial(_gain, name="llama")),
]
TABLE = Table(
    "bayes",
    "Ambiguous functions: meta-learners against the exact Bayes predictor",
    [
        "A task is a sinusoid or a line, each with probability 1/2, of which five points with noise of standard",
        "deviation 0.3 are known; ten further ones are to be predicted (the families of Finn, Xu & Levine, NeurIPS",
        "2018). The exact Bayes predictor is an integral over both families. Every learner is FTML on the stream: each",
        "round brings a task, and a meta-step on 16 tasks of the past follows. At the end it answers the same 200",
        "tasks, which no run has learned.",
    ],
    "ambiguous_functions",
    600,
    CONTESTANTS,
    BARS,
)
render = partial(render_table, TABLE)

if __name__ == "__main__":
    make_command(TABLE)()
