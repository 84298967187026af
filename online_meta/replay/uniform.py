"""Uniform replay: every past round is as likely as any other."""

from online_meta.draws import Draw, Pick, Replay, draw_random, pick_evenly
from online_meta.types import Params


def uniform() -> Replay:
    """Return the policy that draws distinct rounds uniformly; unbiased for the mean over all rounds.

    The meta-batch of FTML's practical algorithm (Finn et al., ICML 2019, algorithm 1).
    """

    def pick(memory: Params, draw: Draw) -> list[Pick]:
        return [Pick(round) for round in pick_evenly(draw.rounds, draw.batch, draw_random(draw))]

    return Replay(pick)
