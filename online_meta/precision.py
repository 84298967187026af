"""A model computed in another precision than its parameters have."""

import torch
from torch import Tensor

from online_meta.types import OutputFn, Params


def in_precision(output: OutputFn, dtype: torch.dtype) -> OutputFn:
    """Return ``output`` computed in ``dtype``, such as bfloat16: parameters and x are cast on the way in.

    The result has the parameters' own precision again, and so have all gradients: the inner loop, which adds small
    steps to large weights, goes on in float32. Integers stay what they are.
    """

    def cast(params: Params, x: Tensor) -> Tensor:
        own = next((value.dtype for value in params.values() if value.is_floating_point()), torch.float32)
        low = {name: value.to(dtype) if value.is_floating_point() else value for name, value in params.items()}
        return output(low, x.to(dtype) if x.is_floating_point() else x).to(own)

    return cast
