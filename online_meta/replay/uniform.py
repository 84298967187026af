"""Uniform replay: revisit every past round with equal probability."""

from online_meta.replay import ReplayPolicy, ReplayRequest, ReplaySample, request_generator, sample_uniformly
from online_meta.types import Params


def uniform() -> ReplayPolicy:
    """Return the policy that draws distinct rounds uniformly; unbiased for the mean over all rounds.

    It is the meta-batch of FTML's practical algorithm (Finn et al., ICML 2019, algorithm 1).

    Returns:
        The policy.
    """

    def sample(memory: Params, request: ReplayRequest) -> list[ReplaySample]:
        return [
            ReplaySample(round) for round in sample_uniformly(request.rounds, request.batch, request_generator(request))
        ]

    return ReplayPolicy(sample)
