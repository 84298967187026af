"""Generate functions that a few samples leave open: half are sinusoids A sin(x + phase), half are lines s x + b.

The families are those of Finn, Xu, Levine, "Probabilistic Model-Agnostic Meta-Learning", NeurIPS 2018. A function has
two parameters, so that the exact answer is a double integral for each family.
"""

import math
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Annotated, NamedTuple

import numpy as np
import torch
from annotated_types import Ge, Gt

from online_meta.outcomes import gaussian_mixture
from online_meta.outcomes._normal import std_to_scale
from online_meta.prediction import point
from online_meta.replay import generator
from online_meta.types import Batch, Prediction, Task, Tensors
from streams.sources import Oracle
from streams.sources._exact import read_samples
from streams.sources._synthetic import FAMILIES, SPEC, Family, Reals, SyntheticSource, sample_task
from streams.spec import TaskSpec, require_same
from streams.types import TaskSource

__all__ = ["SPEC", "Settings", "create_source", "draw_function", "make_task", "oracle"]

SINUSOID = Family((0.1, 0.0), (5.0, math.pi), lambda p, x: p[0] * np.sin(x + p[1]))
LINE = FAMILIES["line"]
STEEPEST = ((SINUSOID, (1.0, 5.0)), (LINE, (5.0, 1.0)))
"""The families, each with the largest absolute derivatives of a function by its two parameters."""
NODES_PER_DEVIATION = 2.0
"""Nodes of the integral for each standard deviation that the narrowest posterior of a parameter can have."""
PANEL = 16
"""Nodes of the integral in a panel, by each parameter."""
MOST_FUNCTIONS = 4_000_000
"""The most nodes of an integral: it takes 0.3 s and 0.3 GB."""
NEGLIGIBLE = 40.0
"""Functions whose posterior density is exp(-40) times the largest one, or less, are left out."""


@dataclass(frozen=True)
class Settings:
    """Options of ``[[source]] kind = "ambiguous_functions"``.

    Attributes:
        tasks: the number of tasks; by default the stream is endless.
        support: the number of support samples per task.
        query: the number of query samples per task.
        per_second: the largest rate of tasks per second; by default there is no limit.
        noise: the standard deviation of the Gaussian noise on y.
    """

    tasks: Annotated[int, Ge(1)] | None = None
    support: Annotated[int, Ge(1)] = 5
    query: Annotated[int, Ge(1)] = 10
    per_second: Annotated[float, Gt(0)] | None = None
    noise: Annotated[float, Gt(0)] = 0.3


def create_source(settings: Settings, spec: TaskSpec, name: str, seed: int) -> TaskSource | None:
    """Return the stream; raise ``ValueError`` if the run expects other tasks."""
    require_same(spec, SPEC, "ambiguous_functions")
    return SyntheticSource(partial(make_task, settings, seed), name, settings.tasks, settings.per_second)


def draw_function(random: np.random.Generator) -> tuple[Family, Reals]:
    """Draw a family, each with probability 1/2, and its parameters: the first draws from a task's generator."""
    family = SINUSOID if random.random() < 0.5 else LINE
    return family, family.parameters(random.random(2))


def make_task(settings: Settings, seed: int, t: int) -> Task:
    """Generate task t of the stream of a seed, as a pure function of the arguments.

    Returns:
        A task of float32 tensors of shape (support, 1) and (query, 1).
    """
    random = generator(seed, t)
    family, parameters = draw_function(random)
    return sample_task(partial(family.value, parameters), random, settings.support, settings.query, settings.noise)


class Nodes(NamedTuple):
    """The nodes of the integral over a family: parameters (2, F, 1), and the logarithms of their prior weights (F,)."""

    family: Family
    parameters: Reals
    log_weights: Reals


@lru_cache(maxsize=4)
def _place_nodes(noise: float, samples: int, density: float) -> tuple[Nodes, ...]:
    """Return the nodes of Gauss-Legendre quadrature for both families, dense enough for the posterior of ``samples``.

    Near its mode, the posterior of a parameter with slope |df/dp| <= g is no narrower than noise / (g sqrt(samples)).
    There are ``density`` nodes for each such width.

    Raises ``ValueError`` if there would be too many.
    """
    panels = [
        [
            max(1, math.ceil(density * (high - low) * slope * math.sqrt(samples) / noise / PANEL))
            for low, high, slope in zip(family.low, family.high, slopes, strict=True)
        ]
        for family, slopes in STEEPEST
    ]
    if (total := PANEL**2 * sum(first * second for first, second in panels)) > MOST_FUNCTIONS:
        raise ValueError(
            f"noise = {noise:g} with {samples - 1} support samples: the exact answer would be an integral over "
            f"{total:,} functions, and at most {MOST_FUNCTIONS:,} are computed: take more noise or fewer samples"
        )
    return tuple(_nodes_of(family, *counts) for (family, _), counts in zip(STEEPEST, panels, strict=True))


def _nodes_of(family: Family, *panels: int) -> Nodes:
    """Return the product of two Gauss-Legendre rules; ``panels`` are the numbers of equal panels of each."""
    places, weights = np.polynomial.legendre.leggauss(PANEL)
    shares = [((np.arange(count)[:, None] + (places + 1) / 2) / count).ravel() for count in panels]
    each = [np.tile(weights / 2 / count, count) for count in panels]
    parameters = np.stack(np.meshgrid(*shares, indexing="ij")).reshape(2, -1, 1)
    low, high = (np.array(one).reshape(2, 1, 1) for one in (family.low, family.high))
    log_weights = np.log(np.multiply.outer(*each).ravel()) - math.log(len(STEEPEST))
    return Nodes(family, low + parameters * (high - low), log_weights)


def oracle(settings: Settings) -> Oracle:
    """Return the exact Bayes predictor, the mixture of all functions by their posterior, from quadrature.

    p(y | x, D) = sum_f 1/2 int p(y | x, f, v) prod_i p(y_i | x_i, f, v) dv / p(D), over the families f and the uniform
    distributions of their parameters v.

    Raises:
        ValueError: if the noise is too small, or there are too many samples, to compute the integral.
    """
    _place_nodes(settings.noise, settings.support + 1, NODES_PER_DEVIATION)
    return partial(_predict, settings.noise)


def _predict(noise: float, support: Batch, x: Tensors) -> Prediction:
    """Return the predictive distribution of targets (m, 1) with such noise."""
    seen, y, asked = (values.numpy() for values in read_samples(support, x, 1))
    families = _place_nodes(noise, len(y) + 1, NODES_PER_DEVIATION)
    posteriors = [_weigh(nodes, seen[:, 0], y, noise) for nodes in families]
    floor = max(log_weights.max() for log_weights in posteriors) - NEGLIGIBLE
    kept = [log_weights > floor for log_weights in posteriors]
    means = np.concatenate(
        [nodes.family.value(nodes.parameters[:, some], asked[:, 0]) for nodes, some in zip(families, kept, strict=True)]
    )
    logits = np.concatenate([log_weights[some] for log_weights, some in zip(posteriors, kept, strict=True)])
    mean, least = torch.from_numpy(means.T[:, None]), noise / 2
    output = {
        "mean": mean,
        "scale": std_to_scale(mean.new_tensor(noise), least).expand_as(mean),
        "logit": torch.from_numpy(logits).expand_as(mean),
    }
    return point(gaussian_mixture.build(least=least), output)


def _weigh(nodes: Nodes, x: Reals, y: Reals, noise: float) -> Reals:
    """Return the logarithms of the posterior weights (F,) of nodes, up to a constant, from samples (n,)."""
    log_weights = nodes.log_weights.copy()
    for x_i, y_i in zip(x, y, strict=True):  # One by one, so that no array is larger than the nodes.
        log_weights -= 0.5 * ((y_i - nodes.family.value(nodes.parameters, x_i)[:, 0]) / noise) ** 2
    return log_weights
