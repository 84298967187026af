"""Uniform replay: every past round is as likely as any other."""

from online_meta.draws import Draw, Pick, generator


def uniform(draw: Draw) -> list[Pick]:
    """Return min(batch, count) distinct rounds, drawn uniformly; unbiased for the mean over all rounds.

    The meta-batch of FTML's practical algorithm (Finn et al., ICML 2019, algorithm 1).
    """
    random = generator(draw.seed, draw.round, draw.step)
    if draw.count <= draw.batch:
        return [Pick(round, 1.0) for round in range(draw.count)]
    # Drawing without replacement would cost O(count) memory by permutation; a set of redraws does not.
    chosen: dict[int, None] = {}
    while len(chosen) < draw.batch:
        chosen.setdefault(int(random.integers(draw.count)))
    return [Pick(round, 1.0) for round in chosen]
