"""Stratified replay: every stretch of the past is in every meta-batch."""

from online_meta.draws import Draw, Pick, Replay, draw_random
from online_meta.types import Params


def stratified() -> Replay:
    """Return the policy that cuts the past into ``batch`` stretches of time and draws one round of each.

    One round of each of B stretches of as equal a length n_s as can be (Neyman, 1934), of weight n_s B / n: unbiased
    for the mean over all n rounds, and of less variance than uniform draws where losses drift along the stream.
    """

    def pick(memory: Params, draw: Draw) -> list[Pick]:
        count = len(draw.rounds)
        many = min(count, draw.batch)
        random = draw_random(draw)
        picks = []
        for stretch in range(many):
            first, last = count * stretch // many, count * (stretch + 1) // many
            picks.append(Pick(int(draw.rounds[int(random.integers(first, last))]), (last - first) * many / count))
        return picks

    return Replay(pick)
