"""Stratified replay: revisit one round from every part of the past in every meta-batch."""

from online_meta.replay import ReplayPolicy, ReplayRequest, ReplaySample, request_generator
from online_meta.types import Params


def stratified() -> ReplayPolicy:
    """Return the policy that divides the past into ``batch`` strata of time and draws one round from each.

    The B strata have lengths n_s that differ by at most 1 (Neyman, 1934). A round has weight n_s B / n, which is
    unbiased for the mean over all n rounds, with less variance than uniform draws if losses drift along the stream.

    Returns:
        The policy.
    """

    def sample(memory: Params, request: ReplayRequest) -> list[ReplaySample]:
        count = len(request.rounds)
        strata = min(count, request.batch)
        random = request_generator(request)
        samples = []
        for stratum in range(strata):
            first, last = count * stratum // strata, count * (stratum + 1) // strata
            samples.append(
                ReplaySample(int(request.rounds[int(random.integers(first, last))]), (last - first) * strata / count)
            )
        return samples

    return ReplayPolicy(sample)
