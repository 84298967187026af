"""Recent replay: revisit only the newest rounds, for streams that drift away from their past."""

from typing import Annotated

from annotated_types import Ge

from online_meta.replay import ReplayPolicy, ReplayRequest, ReplaySample, request_generator, sample_uniformly
from online_meta.types import Params


def recent(window: Annotated[int, Ge(1)] = 100) -> ReplayPolicy:
    """Return the policy that draws distinct rounds uniformly from the ``window`` newest ones.

    It is unbiased for the mean over the window, so it follows the leader of the window and forgets older rounds.

    Args:
        window: the number of newest rounds, at least 1.

    Returns:
        The policy.

    Raises:
        ValueError: if ``window`` is below 1.
    """
    if window < 1:
        raise ValueError(f"window is {window}; it must be at least 1 round")

    def sample(memory: Params, request: ReplayRequest) -> list[ReplaySample]:
        return [
            ReplaySample(round)
            for round in sample_uniformly(request.rounds[-window:], request.batch, request_generator(request))
        ]

    return ReplayPolicy(sample)
