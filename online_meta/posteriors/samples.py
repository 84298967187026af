"""Draws of a random rule, each with its own inner loop."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.utils._pytree import tree_map

from online_meta.functional.keyed import hash_integers
from online_meta.inner import Inner, Posterior, believe_in_point
from online_meta.types import Batch, Belief, Meta


def samples() -> Posterior:
    """Return the posterior of S draws of the rule: each starts, steps and is viewed with numbers of its own.

    Of a rule whose ``start`` or ``view`` draws, these are samples of what it believes, as in amortised and in
    variational methods (Ravi & Beatson, ICLR 2019; Garnelo et al., 2018). All have the weight 1 / S. The first s of S
    samples are those of S = s.

    Returns:
        The posterior. It raises ``ValueError`` for an inner loop in which nothing is drawn by key.
    """
    return _believe


def _believe(inner: Inner, meta: Meta, support: Batch, samples: int, stops: Sequence[int]) -> tuple[Belief, ...]:
    if "keyed" not in (inner.rule.random, getattr(inner.loss, "random", False)) and inner.begin != "fresh":
        raise ValueError(
            'posterior = "samples" needs a rule that draws by key (random="keyed"), or begin = "fresh"; here nothing '
            'is drawn by key, so all samples would be equal: use posterior = "point", or a rule that draws'
        )
    if samples < 1:
        raise ValueError(f"samples is {samples}: a belief has 1 sample or more")
    each = [
        believe_in_point(replace(inner, seed=_seed_of(inner.seed, sample)), meta, support, 1, stops)
        for sample in range(samples)
    ]
    return tuple(_weigh_equally(beliefs) for beliefs in zip(*each, strict=True))


def _seed_of(seed: int, sample: int) -> int:
    """Return the seed of a sample; that of the first one is the inner loop's own."""
    return hash_integers(seed, sample) if sample else seed


def _weigh_equally(beliefs: Sequence[Belief]) -> Belief:
    joined: Belief = tree_map(lambda *parts: torch.cat(parts), *beliefs)
    return joined._replace(log_weights=torch.log_softmax(joined.log_weights, 0))
