"""Coreset replay: few weighted rounds whose meta-gradients stand for those of all."""

from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge
from numpy.typing import NDArray
from torch import Tensor

from online_meta.draws import (
    Draw,
    Pick,
    Replay,
    as_memory,
    draw_random,
    generator,
    pick_by_chance,
    rounds_behind,
    still_there,
)
from online_meta.types import MetaGrad, Params


def coreset(size: Annotated[int, Ge(1)] = 200, width: Annotated[int, Ge(1)] = 256) -> Replay:
    """Return the policy that revisits a coreset of ``size`` rounds, each standing for ``weights`` rounds like it.

    A new round is revisited at once, and stands for itself. When there are more than ``size``, the two rounds i, j of
    the least min(w_i, w_j) ||g_i - g_j|| become one, the heavier of them, which stands for both: a greedy way, for a
    stream, to keep sum_k ||g_k - g_j(k)||, a bound of the error of the coreset's gradient, small (CRAIG, Mirzasoleiman
    et al., ICML 2020). Of a gradient, ``width`` numbers are kept that have its inner products in expectation (count
    sketch, Charikar et al., 2002), from when its round was last revisited. What is drawn is unbiased for the
    coreset's weighted mean; that is near the mean over all rounds, and not it.

    Raises ``ValueError`` when an argument is below 1.
    """
    if size < 1 or width < 1:
        raise ValueError(f"size is {size} and width {width}: both are 1 or more")
    hashes: dict[int, tuple[Tensor, Tensor]] = {}

    def start() -> Params:
        return as_memory(
            0, np.array([], np.int64), weights=np.array([], np.float64), sketches=np.zeros((0, width), np.float32)
        )

    def meet(memory: Params, draw: Draw) -> Params:
        kept = still_there(draw.rounds, memory["rounds"].numpy())
        return {name: value if name == "next" else value[torch.from_numpy(kept)] for name, value in memory.items()}

    def pick(memory: Params, draw: Draw) -> list[Pick]:
        fresh, weights = rounds_behind(draw.rounds, int(memory["next"])), memory["weights"].numpy()
        first = fresh[: max(1, draw.batch // 2) if len(weights) else draw.batch].tolist()
        old, room = memory["rounds"].tolist(), draw.batch - len(first)
        if len(old) <= room:
            hits = [(at, float(weights[at]), 1.0) for at in range(len(old))]
        else:
            worth = weights.sum() / max(1, room)
            found = pick_by_chance(weights, room, draw_random(draw)) if room else []
            hits = [(at, many * worth, float(many)) for at, many in found]
        # Shares count draws; weights are those of a mean over all rounds that the picks stand for.
        draws, rounds = len(first) + sum(share for *_, share in hits), len(fresh) + (weights.sum() if hits else 0.0)
        each = draws / rounds
        picks = [Pick(round, float(each * len(fresh) / len(first))) for round in first]
        return picks + [Pick(old[at], float(each * weight), share) for at, weight, share in hits]

    def measure(gradient: MetaGrad) -> Tensor:
        flat = torch.cat([grad.reshape(-1) for part in gradient.grads for grad in part.values()])
        if len(flat) not in hashes:
            random = generator(len(flat), width)
            signs = torch.from_numpy(random.integers(0, 2, len(flat)) * 2 - 1)
            hashes[len(flat)] = (torch.from_numpy(random.integers(0, width, len(flat))), signs)
        buckets, signs = (part.to(flat.device) for part in hashes[len(flat)])
        return torch.zeros(width, device=flat.device, dtype=flat.dtype).index_add(0, buckets, flat * signs)

    def note(memory: Params, draw: Draw, rounds: list[int], values: Tensor) -> Params:
        own, weights, sketches = (memory[name].numpy().copy() for name in ("rounds", "weights", "sketches"))
        seen = values.numpy().astype(np.float32)
        sound, new = np.isfinite(seen).all(1), np.array(rounds) >= int(memory["next"])
        again = sound & ~new
        sketches[np.searchsorted(own, np.array(rounds)[again])] = seen[again]
        order = np.flatnonzero(new & sound)
        own = np.append(own, np.array(rounds, np.int64)[order])
        weights, sketches = np.append(weights, np.ones(len(order))), np.concatenate([sketches, seen[order]])
        following = max([int(memory["next"]), *(round + 1 for round in rounds)])
        while len(own) > size:
            goes, stays = _closest(weights, sketches)
            weights[stays] += weights[goes]
            own, weights, sketches = (np.delete(part, goes, 0) for part in (own, weights, sketches))
        return as_memory(following, own, weights=weights, sketches=sketches)

    return Replay(pick, start, meet, measure, note)


def _closest(weights: NDArray[np.float64], sketches: NDArray[np.float32]) -> tuple[int, int]:
    """Return the pair that costs least to make one: the lighter, and the heavier, which stays."""
    rows = torch.from_numpy(sketches).double()
    apart = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").numpy()
    cost = np.minimum.outer(weights, weights) * apart
    np.fill_diagonal(cost, np.inf)
    one, other = np.unravel_index(int(cost.argmin()), cost.shape)
    return (int(one), int(other)) if weights[one] <= weights[other] else (int(other), int(one))
