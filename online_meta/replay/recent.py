"""Recent replay: the newest rounds alone, for streams that leave their past behind."""

from typing import Annotated

from annotated_types import Ge

from online_meta.replay import ReplayPolicy, ReplayRequest, ReplaySample, request_generator, sample_uniformly
from online_meta.types import Params


def recent(window: Annotated[int, Ge(1)] = 100) -> ReplayPolicy:
    """Return the policy that draws distinct rounds uniformly among the ``window`` newest ones.

    What it follows is another leader than that of all rounds: argmin_w of the sum over the window, which forgets on
    purpose. It is unbiased for the window's mean.

    Raises ``ValueError`` when ``window`` is below 1.
    """
    if window < 1:
        raise ValueError(f"window is {window}: it is 1 round or more")

    def sample(memory: Params, request: ReplayRequest) -> list[ReplaySample]:
        return [
            ReplaySample(round)
            for round in sample_uniformly(request.rounds[-window:], request.batch, request_generator(request))
        ]

    return ReplayPolicy(sample)
