"""Few numbers that stand for many, with their inner products."""

from collections.abc import Callable

import torch
from torch import Tensor

from online_meta.draws import generator
from online_meta.types import MetaGrad


def count_sketch(width: int) -> Callable[[MetaGrad], Tensor]:
    """Return gradient -> (width,), a linear map that keeps inner products in expectation (Charikar et al., 2002).

    Each entry of the gradient is added to one of ``width`` numbers, with a sign; which one, and the sign, are a
    function of the gradient's size.
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
