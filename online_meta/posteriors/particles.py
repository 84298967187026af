"""The particles of a rule, each at the end of the inner loop."""

from collections.abc import Sequence

from online_meta.functional.randomness import INIT_STEP
from online_meta.inner import Inner, Posterior, drawing, effective_particles, run_trajectory, weigh_equally
from online_meta.types import Batch, Belief, Meta


def particles() -> Posterior:
    """Return the posterior of a rule that adapts M particles at once, such as ``svgd``: each has the weight 1 / M.

    This is the belief of Bayesian MAML (Yoon et al., NeurIPS 2018).

    Returns:
        The posterior. It raises ``ValueError`` for a rule without particles, or for another number of samples than M.
    """
    return _believe


def _believe(inner: Inner, meta: Meta, support: Batch, samples: int, stops: Sequence[int]) -> tuple[Belief, ...]:
    if inner.rule.particles is None:
        raise ValueError(
            'posterior = "particles" needs a rule that adapts several models, and this one adapts a single one: use '
            'rule = "svgd" with options = { particles = 5 }, or posterior = "point"'
        )
    found = []
    for carry in run_trajectory(inner, meta, support, stops):
        with drawing(inner, support, INIT_STEP, "posterior"):
            each = effective_particles(inner, meta, carry.phi)
        if len(each) != samples:
            raise ValueError(f"samples is {samples}, but the rule has {len(each)} particles: set samples = {len(each)}")
        found.append(weigh_equally(each))
    return tuple(found)
