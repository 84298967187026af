"""Which component of a mixture a task belongs to: the Chinese restaurant process, and Bayes' rule."""

from collections.abc import Sequence

import torch
from torch import Tensor


def crp_prior(counts: Sequence[float], concentration: float) -> Tensor:
    """Return the probability that the next task is of each component, and, last, of a new one: (components + 1,).

    p(l) = n_l / (n + a) and p(new) = a / (n + a), where n_l counts the tasks of component l, n is their sum and a the
    ``concentration`` (Aldous, 1985): with n tasks one expects a log(1 + n / a) components. In float64.
    """
    weights = torch.tensor([*counts, concentration], dtype=torch.float64)
    return weights / weights.sum()


def responsibilities(prior: Tensor, losses: Sequence[float], samples: int, temperature: float) -> Tensor:
    """Return p(l | support set), proportional to prior_l exp(-samples losses_l / temperature); in float64.

    ``losses`` are means over the ``samples`` of the support set. In nats, temperature 1 is Bayes' rule; of squares, it
    is for a variance of temperature / 2. A loss that is not finite explains nothing; all are 0 where none is finite.
    """
    fits = torch.tensor([*losses], dtype=torch.float64)
    joint = prior.log() - samples * fits / temperature
    joint = torch.where(torch.isfinite(fits), joint, -torch.inf)
    return torch.nan_to_num(torch.softmax(joint, 0), nan=0.0)
