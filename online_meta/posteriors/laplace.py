"""Laplace's approximation: a normal distribution around the end of the inner loop."""

from collections.abc import Sequence
from functools import partial

from online_meta.functional.curvature import Curvature, compute_precision, require_fit, require_options
from online_meta.functional.keyed import keyed, normal_like_all
from online_meta.functional.randomness import INIT_STEP
from online_meta.inner import Inner, Posterior, effective_params, run_trajectory, view_adapted, weigh_equally
from online_meta.tree import add
from online_meta.types import Batch, Belief, Meta, Params


def laplace(*, curvature: Curvature = "full", strength: float | None = None) -> Posterior:
    """Return the posterior N(phi_K, H^-1) of LLAMA (Grant et al., ICLR 2018), with draws of equal weight.

    phi_K, the end of the inner loop, is taken for the mode, and H is the curvature of the support set's negative
    log-likelihood there plus strength I; see ``compute_precision``. The likelihood should be in nats, such as
    ``gaussian_of_noise`` or ``categorical``. The prior of ``proximal`` is that of the rule: its strength times n,
    because the rule sees a mean over n samples. Its end, converged, is then the mode. A single sample is phi_K itself;
    several are all draws.

    Args:
        curvature: "full", for at most 2,000 weights that adapt; "kron", a Kronecker product for each linear layer;
            "diag", the diagonal.
        strength: the precision of the prior of the weights that adapt, above 0; by default that of the rule, or 1 if
            the rule has none.

    Returns:
        The posterior. It raises ``ValueError`` for a number of weights, a model or a loss that the curvature does not
        take, for a rule with particles, and for a ``strength`` beside that of the rule.

    Raises:
        ValueError: if an option is out of range.
    """
    require_options(curvature, strength)
    return partial(_believe, curvature, strength)


def _believe(
    curvature: Curvature,
    strength: float | None,
    inner: Inner,
    meta: Meta,
    support: Batch,
    samples: int,
    stops: Sequence[int],
) -> tuple[Belief, ...]:
    require_fit(inner, strength)
    found = []
    for carry in run_trajectory(inner, meta, support, stops):
        if samples == 1:
            each = [view_adapted(inner, meta, carry.phi, support)]
        else:
            each = _draw(curvature, strength, inner, meta, carry.phi, support, samples)
        found.append(weigh_equally(each))
    return tuple(found)


def _draw(
    curvature: Curvature, strength: float | None, inner: Inner, meta: Meta, phi: Params, support: Batch, samples: int
) -> list[Params]:
    precision = compute_precision(inner, meta, phi, support, curvature, strength)
    with keyed(support, INIT_STEP, "posterior", inner.seed):
        return [
            effective_params(inner, meta, add(phi, precision.deviate(normal_like_all(phi)))) for _ in range(samples)
        ]
