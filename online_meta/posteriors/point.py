"""One set of parameters, the end of the inner loop."""

from online_meta.inner import Posterior, believe_in_point


def point() -> Posterior:
    """Return the posterior that believes in phi_K alone: one sample, with weight 1.

    If the rule draws random numbers by key, it is the first of its draws.

    Returns:
        The posterior. It raises ``ValueError`` for more samples than 1.
    """
    return believe_in_point
