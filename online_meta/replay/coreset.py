"""Coreset replay: a few weighted rounds whose meta-gradients represent those of all rounds."""

from collections.abc import Callable
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge
from numpy.typing import NDArray
from torch import Tensor

from online_meta.replay import (
    ReplayPolicy,
    ReplayRequest,
    ReplaySample,
    among_rounds,
    generator,
    pack_memory,
    request_generator,
    rounds_from,
    sample_systematically,
)
from online_meta.types import MetaGrad, Params


def count_sketch(width: int) -> Callable[[MetaGrad], Tensor]:
    """Return gradient -> (width,), a linear map that keeps inner products in expectation (Charikar et al., 2002).

    Each entry of the gradient is added with a random sign to one of ``width`` buckets. Buckets and signs are a function
    of the gradient's size and ``width``.
    """
    maps: dict[int, tuple[Tensor, Tensor]] = {}

    def sketch(gradient: MetaGrad) -> Tensor:
        flat = torch.cat([grad.reshape(-1) for part in gradient.grads for grad in part.values()])
        if len(flat) not in maps:
            random = generator(len(flat), width)
            signs = torch.from_numpy(random.integers(0, 2, len(flat)) * 2 - 1)
            maps[len(flat)] = (torch.from_numpy(random.integers(0, width, len(flat))), signs)
        buckets, signs = (part.to(flat.device) for part in maps[len(flat)])
        return flat.new_zeros(width).index_add(0, buckets, flat * signs)

    return sketch


def coreset(size: Annotated[int, Ge(1)] = 200, width: Annotated[int, Ge(1)] = 256) -> ReplayPolicy:
    """Return the policy that revisits a coreset of ``size`` rounds, each with the weight of the rounds it represents.

    A new round is revisited at once and has weight 1. If there are more than ``size`` rounds, the two rounds i, j with
    the smallest min(w_i, w_j) ||g_i - g_j|| are merged: the heavier one stays and represents both. This greedy
    method keeps sum_k ||g_k - g_j(k)|| small, a bound of the error of the coreset's gradient (CRAIG, Mirzasoleiman
    et al., ICML 2020). Of each gradient the memory has a count sketch of ``width`` values (Charikar et al., 2002), from
    the last time its round was revisited. A draw is unbiased for the coreset's weighted mean, which only approximates
    the mean over all rounds.

    Args:
        size: the number of rounds in the coreset, at least 1.
        width: the number of values in a gradient's sketch, at least 1.

    Returns:
        The policy; its memory has O(size (size + width)) values.

    Raises:
        ValueError: if an option is below 1.
    """
    if size < 1 or width < 1:
        raise ValueError(f"size is {size} and width {width}: both are 1 or more")

    def start() -> Params:
        return pack_memory(
            0,
            np.array([], np.int64),
            weights=np.array([], np.float64),
            sketches=np.zeros((0, width), np.float32),
            apart=np.zeros((0, 0), np.float64),
        )

    def begin_round(memory: Params, request: ReplayRequest) -> Params:
        kept = torch.from_numpy(among_rounds(request.rounds, memory["rounds"].numpy()))
        if kept.all():
            return memory
        left = {name: value if name == "next" else value[kept] for name, value in memory.items()}
        return {**left, "apart": left["apart"][:, kept]}

    def sample(memory: Params, request: ReplayRequest) -> list[ReplaySample]:
        new_rounds, weights = rounds_from(request.rounds, int(memory["next"])), memory["weights"].numpy()
        first = new_rounds[: max(1, request.batch // 2) if len(weights) else request.batch].tolist()
        hits = _draw_coreset(weights, request.batch - len(first), request_generator(request))
        # Shares count draws; the weights make a mean over all rounds that the samples represent.
        draws, represented = (
            len(first) + sum(hit.share for hit in hits),
            len(new_rounds) + (weights.sum() if hits else 0.0),
        )
        samples = [ReplaySample(round, len(new_rounds) / len(first)) for round in first]
        samples += [hit._replace(round=int(memory["rounds"][hit.round])) for hit in hits]
        return [sample._replace(weight=float(sample.weight * draws / represented)) for sample in samples]

    def record(memory: Params, request: ReplayRequest, rounds: list[int], values: Tensor) -> Params:
        return _merge(_add_rounds(memory, np.array(rounds, np.int64), values.numpy().astype(np.float32)), size)

    return ReplayPolicy(sample, start, begin_round, count_sketch(width), record)


def _draw_coreset(weights: NDArray[np.float64], room: int, random: np.random.Generator) -> list[ReplaySample]:
    """Draw ``room`` rounds by weight, each representing an equal part of the total; return all if they fit.

    The ``round`` of a returned sample is its index in the coreset.
    """
    if len(weights) <= room:
        return [ReplaySample(at, float(weights[at])) for at in range(len(weights))]
    found = sample_systematically(weights, room, random) if room else []
    return [ReplaySample(at, hits * float(weights.sum()) / room, float(hits)) for at, hits in found]


def _add_rounds(memory: Params, rounds: NDArray[np.int64], seen: NDArray[np.float32]) -> Params:
    """Add the new ones among ``rounds`` with weight 1 and update the sketches of the others; return the memory."""
    own, weights, sketches = (memory[name].numpy().copy() for name in ("rounds", "weights", "sketches"))
    following = int(memory["next"])
    sound, new = np.isfinite(seen).all(1), rounds >= following
    again, added = sound & ~new, sound & new
    places = np.searchsorted(own, rounds[again])
    sketches[places] = seen[again]
    sketches = np.concatenate([sketches, seen[added]])
    return pack_memory(
        max([following, *(rounds + 1).tolist()]),
        np.append(own, rounds[added]),
        weights=np.append(weights, np.ones(added.sum())),
        sketches=sketches,
        apart=_update_distances(
            memory["apart"].numpy(), sketches, np.append(places, np.arange(len(own), len(own) + added.sum()))
        ),
    )


def _update_distances(
    before: NDArray[np.float64], sketches: NDArray[np.float32], changed: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the distances between all sketches, recomputing only those to the ``changed`` (and new) ones.

    Computing all distances at each step would cost more than the meta-gradients of a small model.
    """
    count, rows = len(sketches), torch.from_numpy(sketches).double()
    apart = np.zeros((count, count))
    apart[: len(before), : len(before)] = before
    found = torch.cdist(rows[changed], rows, compute_mode="donot_use_mm_for_euclid_dist").numpy()
    apart[changed], apart[:, changed] = found, found.T
    return apart


def _merge(memory: Params, size: int) -> Params:
    """Merge rounds until at most ``size`` are left; return the memory."""
    own, weights, sketches, apart = (memory[name].numpy() for name in ("rounds", "weights", "sketches", "apart"))
    while len(own) > size:
        lighter, heavier = _cheapest_pair(weights, apart)
        weights[heavier] += weights[lighter]
        own, weights, sketches, apart = (np.delete(part, lighter, 0) for part in (own, weights, sketches, apart))
        apart = np.delete(apart, lighter, 1)
    return pack_memory(int(memory["next"]), own, weights=weights, sketches=sketches, apart=apart)


def _cheapest_pair(weights: NDArray[np.float64], apart: NDArray[np.float64]) -> tuple[int, int]:
    """Return the pair that is cheapest to merge: the lighter round, and the heavier one, which stays."""
    cost = np.minimum.outer(weights, weights) * apart
    np.fill_diagonal(cost, np.inf)
    one, other = np.unravel_index(int(cost.argmin()), cost.shape)
    return (int(one), int(other)) if weights[one] <= weights[other] else (int(other), int(one))
