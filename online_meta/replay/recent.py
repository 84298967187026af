"""Recent replay: the newest rounds alone, for streams that leave their past behind."""

from typing import Annotated

from annotated_types import Ge

from online_meta.draws import Draw, Pick, Replay, draw_random, pick_evenly
from online_meta.types import Params


def recent(window: Annotated[int, Ge(1)] = 100) -> Replay:
    """Return the policy that draws distinct rounds uniformly among the ``window`` newest ones.

    What it follows is another leader than that of all rounds: argmin_w of the sum over the window, which forgets on
    purpose. It is unbiased for the window's mean.

    Raises ``ValueError`` when ``window`` is below 1.
    """
    if window < 1:
        raise ValueError(f"window is {window}: it is 1 round or more")

    def pick(memory: Params, draw: Draw) -> list[Pick]:
        return [Pick(round) for round in pick_evenly(draw.rounds[-window:], draw.batch, draw_random(draw))]

    return Replay(pick)
