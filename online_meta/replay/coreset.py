"""Coreset replay: few weighted rounds whose meta-gradients stand for those of all."""

from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge
from numpy.typing import NDArray
from torch import Tensor

from online_meta.draws import Draw, Pick, Replay, as_memory, draw_random, pick_by_chance, rounds_behind, still_there
from online_meta.replay._sketch import count_sketch
from online_meta.types import Params


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
        hits = _draw_core(weights, draw.batch - len(first), draw_random(draw))
        # Shares count draws; weights are those of a mean over all rounds that the picks stand for.
        draws, stood_for = len(first) + sum(hit.share for hit in hits), len(fresh) + (weights.sum() if hits else 0.0)
        picks = [Pick(round, len(fresh) / len(first)) for round in first]
        picks += [hit._replace(round=int(memory["rounds"][hit.round])) for hit in hits]
        return [pick._replace(weight=float(pick.weight * draws / stood_for)) for pick in picks]

    def note(memory: Params, draw: Draw, rounds: list[int], values: Tensor) -> Params:
        return _merge(_take_in(memory, np.array(rounds, np.int64), values.numpy().astype(np.float32)), size)

    return Replay(pick, start, meet, count_sketch(width), note)


def _draw_core(weights: NDArray[np.float64], room: int, random: np.random.Generator) -> list[Pick]:
    """Return ``room`` draws by weight, by index, each for an equal part of all weights; all, if there is room."""
    if len(weights) <= room:
        return [Pick(at, float(weights[at])) for at in range(len(weights))]
    found = pick_by_chance(weights, room, random) if room else []
    return [Pick(at, many * float(weights.sum()) / room, float(many)) for at, many in found]


def _take_in(memory: Params, rounds: NDArray[np.int64], seen: NDArray[np.float32]) -> Params:
    """Return the memory with the new ones among ``rounds``, each of weight 1, and newer sketches of the others."""
    own, weights, sketches = (memory[name].numpy().copy() for name in ("rounds", "weights", "sketches"))
    following = int(memory["next"])
    sound, new = np.isfinite(seen).all(1), rounds >= following
    again, added = sound & ~new, sound & new
    sketches[np.searchsorted(own, rounds[again])] = seen[again]
    return as_memory(
        max([following, *(rounds + 1).tolist()]),
        np.append(own, rounds[added]),
        weights=np.append(weights, np.ones(added.sum())),
        sketches=np.concatenate([sketches, seen[added]]),
    )


def _merge(memory: Params, size: int) -> Params:
    """Return the memory with so many rounds merged that at most ``size`` are left."""
    own, weights, sketches = (memory[name].numpy() for name in ("rounds", "weights", "sketches"))
    while len(own) > size:
        goes, stays = _closest(weights, sketches)
        weights[stays] += weights[goes]
        own, weights, sketches = (np.delete(part, goes, 0) for part in (own, weights, sketches))
    return as_memory(int(memory["next"]), own, weights=weights, sketches=sketches)


def _closest(weights: NDArray[np.float64], sketches: NDArray[np.float32]) -> tuple[int, int]:
    """Return the pair that costs least to make one: the lighter, and the heavier, which stays."""
    rows = torch.from_numpy(sketches).double()
    apart = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").numpy()
    cost = np.minimum.outer(weights, weights) * apart
    np.fill_diagonal(cost, np.inf)
    one, other = np.unravel_index(int(cost.argmin()), cost.shape)
    return (int(one), int(other)) if weights[one] <= weights[other] else (int(other), int(one))
