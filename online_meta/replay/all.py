"""Full replay: every past round, at every meta-step."""

from online_meta.draws import Draw, Pick


def all(draw: Draw) -> list[Pick]:
    """Return every round once: follow the meta-leader to the letter, at a cost that grows with the stream.

    The objective sum_{k<=t} f_k(U_k(w)) of Finn et al., ICML 2019, eq. 3; ``batch`` is not obeyed.
    """
    return [Pick(round, 1.0) for round in range(draw.count)]
