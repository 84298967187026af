"""Prioritised replay: revisit rounds with larger losses or gradients more often, with smaller weights."""

from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Gt, Lt
from numpy.typing import NDArray
from torch import Tensor

from online_meta.replay import (
    ReplayPolicy,
    ReplayRequest,
    ReplaySample,
    pack_memory,
    request_generator,
    sample_systematically,
)
from online_meta.replay.reservoir import update_sample
from online_meta.tree import norm
from online_meta.types import MetaGrad, Params


def prioritised(
    by: Literal["loss", "gradient_norm"] = "gradient_norm",
    exponent: Annotated[float, Ge(0)] = 1.0,
    uniform_share: Annotated[float, Gt(0), Lt(1)] = 0.2,
    size: Annotated[int, Ge(1)] = 10_000,
) -> ReplayPolicy:
    """Return the policy that draws a round with a probability that grows with its loss or gradient norm.

    P(i) = (1 - u) p_i^a / sum_k p_k^a + u / n, where the priority p_i was measured when round i was last revisited, or
    is the largest of all before that (Schaul et al., ICLR 2016). The weights 1 / (n P(i)) are below 1 / u and make the
    expected meta-gradient that of all n rounds. With gradient norms and a = 1 the variance would be minimal if the
    norms were up to date (Zhao and Zhang, ICML 2015). The n rounds are a reservoir of at most ``size``.

    Args:
        by: what is measured: "loss", the absolute query loss, or "gradient_norm", the norm of the meta-gradient.
        exponent: a, at least 0; 0 draws uniformly.
        uniform_share: u, in (0, 1).
        size: the number of rounds in the reservoir, at least 1.

    Raises:
        ValueError: if an option is out of range.
    """
    if by not in ("loss", "gradient_norm"):
        raise ValueError(f"by is {by!r}; it must be 'loss' or 'gradient_norm'")
    if exponent < 0 or not 0 < uniform_share < 1 or size < 1:
        raise ValueError(
            f"exponent is {exponent}, uniform_share is {uniform_share}, size is {size}: exponent must be at least 0, "
            "uniform_share strictly between 0 and 1, and size at least 1"
        )

    def start() -> Params:
        return pack_memory(0, np.array([], np.int64), priorities=np.array([], np.float64))

    def begin_round(memory: Params, request: ReplayRequest) -> Params:
        rounds, places = update_sample(memory, request, size)
        before = memory["priorities"].numpy()
        # New rounds have index -1, where the largest priority is appended.
        priorities = np.append(before, before.max(initial=0.0) or 1.0)[places]
        return pack_memory(request.round + 1, rounds, priorities=priorities)

    def sample(memory: Params, request: ReplayRequest) -> list[ReplaySample]:
        rounds = memory["rounds"].numpy()
        if len(rounds) <= request.batch:
            return [ReplaySample(int(round)) for round in rounds]
        probabilities = _probabilities(memory["priorities"].numpy() ** exponent, uniform_share)
        weights = 1.0 / (len(rounds) * probabilities)
        hits = sample_systematically(probabilities, request.batch, request_generator(request))
        return [
            ReplaySample(int(rounds[at]), hit_count * float(weights[at]), float(hit_count)) for at, hit_count in hits
        ]

    def measure(gradient: MetaGrad) -> Tensor:
        return (gradient.loss.abs() if by == "loss" else norm(gradient.grads)).reshape(1)

    def record(memory: Params, request: ReplayRequest, rounds: list[int], values: Tensor) -> Params:
        own, priorities = memory["rounds"].numpy(), memory["priorities"].numpy().copy()
        priorities[np.searchsorted(own, rounds)] = np.nan_to_num(values[:, 0].numpy(), nan=0.0, posinf=0.0)
        return pack_memory(int(memory["next"]), own, priorities=priorities)

    return ReplayPolicy(sample, start, begin_round, measure, record)


def _probabilities(priorities: NDArray[np.float64], uniform_share: float) -> NDArray[np.float64]:
    """Return each round's probability; uniform if no priority is above 0."""
    even = np.full(len(priorities), 1.0 / len(priorities))
    total = priorities.sum()
    return (1 - uniform_share) * priorities / total + uniform_share * even if total > 0 else even
