"""What ``objective`` and ``return`` share: the output itself is what counts."""

from torch import Tensor

from online_meta.outcomes import average_outputs, misfit, require_tensor, sum_rows
from online_meta.types import Outcome, Tensors


def build_total(name: str, sign: int) -> Outcome:
    """Return the outcome whose loss of a row is ``sign`` times the sum of its outputs; ``name`` is for messages."""

    def nll(output: Tensors, y: Tensors) -> Tensor:
        rows = len(y) if isinstance(y, Tensor) else len(next(iter(y.values())))
        if not isinstance(output, Tensor) or output.ndim < 1 or len(output) != rows:
            raise misfit(name, output, y, f"an output of {rows} rows, ({rows}, ...)")
        return sign * sum_rows(output)

    def mean(output: Tensors) -> Tensor:
        return require_tensor(name, output)

    return Outcome(nll, mean, loss=lambda output, y: nll(output, y).mean(), pool=average_outputs)
