"""How sharply a support set determines what adapts: the precision of Laplace's approximation, in three forms."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from online_meta.batches import count_samples, first_tensor, map_tensors, sum_weights
from online_meta.functional.keyed import keyed
from online_meta.functional.randomness import INIT_STEP
from online_meta.inner import Inner, effective_params
from online_meta.types import Batch, Meta, Params, Tensors

Curvature = Literal["full", "kron", "diag"]
"""The whole matrix, a Kronecker product for each linear layer, or the diagonal."""

MOST_WEIGHTS = 2000
"""The largest number of weights with a "full" curvature: the matrix then has 32 MB."""


class PrecisionMatrix(NamedTuple):
    """The precision H of a normal distribution of phi.

    Attributes:
        log_det: () -> log det H, a float64 scalar that is differentiable in what H was computed from.
        deviate: standard normal numbers, by the names of phi -> the deviation from the mean, by N(0, H^-1), that they
            give.
    """

    log_det: Callable[[], Tensor]
    deviate: Callable[[Params], Params]


def require_options(curvature: str, strength: float | None) -> None:
    """Raise ``ValueError`` for an unknown curvature, or a strength that is not positive."""
    if curvature not in get_args(Curvature):
        raise ValueError(f"curvature is {curvature!r}: it is one of {', '.join(get_args(Curvature))}")
    if strength is not None and not 0 < strength < math.inf:
        raise ValueError(f"strength is {strength}: the precision of a prior is positive and finite")


def require_fit(inner: Inner, strength: float | None) -> None:
    """Raise ``ValueError`` for an inner loop that has no such approximation, or a prior beside that of its rule."""
    if inner.rule.particles is not None:
        raise ValueError(
            "Laplace's approximation is around one model, and the rule adapts several: use posterior = 'particles', "
            "and the meta-gradient exact or chaser"
        )
    outcome = getattr(inner.loss, "answer_outcome", None)
    if outcome is None or outcome.root is None:
        raise ValueError(
            "Laplace's approximation needs the curvature of the loss: use one of om.model_loss with the loss "
            "'categorical', 'cross_entropy', 'gaussian', 'gaussian_of_noise', 'bernoulli', 'poisson' or 'mse'"
        )
    if strength is not None and inner.rule.strength is not None:
        raise ValueError(
            f"Laplace's approximation is to have a prior of strength = {strength:g}, and the inner rule has one of its "
            f"own, with strength = {inner.rule.strength:g} for each sample of the support set: leave out the strength "
            "of Laplace's approximation, which then has that of the rule"
        )


def _find_strength(inner: Inner, support: Batch, strength: float | None) -> float | Tensor:
    """Return the precision of the prior: that of the rule's steps, if it has one, or else ``strength``, by default 1.

    The precision of the rule is that of one sample if there is none.
    """
    if inner.rule.strength is None:
        return 1.0 if strength is None else strength
    n = sum_weights(support)
    return inner.rule.strength * (torch.where(n > 0, n, 1).double() if isinstance(n, Tensor) else max(n, 1))


def compute_precision(
    inner: Inner, meta: Meta, phi: Params, support: Batch, curvature: Curvature, strength: float | None = None
) -> PrecisionMatrix:
    """Return H = sum_i w_i J_i^T F_i J_i + strength I, the curvature of the support set's negative log-likelihood.

    J_i is the derivative of the model's output for sample i by phi, in evaluation mode, and F_i the Fisher information
    of the outcome: this is the generalised Gauss-Newton matrix, which is never indefinite. It is the curvature of the
    sum over n samples, which is n times that of their mean. "diag" is its diagonal. "kron" is a product for each linear
    layer, A the mean of a a^T over the inputs a with a constant 1 for the bias, G the sum of g g^T over the gradients g
    of its output (K-FAC: Martens & Grosse, ICML 2015); it is whole for a single layer if there is one sample, or if the
    information is the same for all samples.

    Args:
        inner: the inner loop, with a loss of ``om.model_loss``.
        meta: the meta-parameters; of the weights, those that do not adapt are enough.
        phi: where the curvature is computed; the precision is that of all its entries.
        support: the support set, of n samples; n may be 0.
        curvature: the form of the matrix.
        strength: the precision of the prior, above 0, by default 1; None for that of a rule that has one.

    Returns:
        The precision. It works under ``torch.func.vmap``, and can be differentiated in ``meta`` and ``phi``.

    Raises:
        ValueError: for more than 2,000 weights and "full", for "kron" if a weight that adapts is not one of a linear
            layer, a loss whose curvature is not known, or a strength if the rule has one.
    """
    require_fit(inner, strength)
    prior = _find_strength(inner, support, strength)
    count = sum(value.numel() for value in phi.values())
    if curvature == "full" and count > MOST_WEIGHTS:
        raise ValueError(
            f'curvature = "full" is a matrix of {count:,} x {count:,} numbers for {count:,} weights that adapt, and at '
            f'most {MOST_WEIGHTS:,} are taken: use curvature = "kron", for linear layers, or "diag", or let fewer '
            'weights adapt, such as fast = ["head.*"]'
        )
    if not count_samples(support):  # Some layers refuse an input without rows.
        return _divide(torch.ones_like(_join(phi)) * prior, phi)
    if curvature == "kron":
        return _join_layers(_find_layers(inner, meta, phi, support), phi, prior)
    rows = _find_rows(inner, meta, phi, support)
    if curvature == "diag":
        return _divide(rows.square().sum(0) + prior, phi)
    return _factorise(rows.T @ rows + prior * torch.eye(count).to(rows), phi)


def _factorise(matrix: Tensor, phi: Params) -> PrecisionMatrix:
    factor = torch.linalg.cholesky(matrix)

    def deviate(noise: Params) -> Params:
        joined = _join(noise)[:, None]
        return _split(torch.linalg.solve_triangular(factor.mT, joined, upper=True)[:, 0], phi)

    return PrecisionMatrix(lambda: 2 * factor.diagonal().log().sum(), deviate)


def _divide(diagonal: Tensor, phi: Params) -> PrecisionMatrix:
    return PrecisionMatrix(lambda: diagonal.log().sum(), lambda noise: _split(_join(noise) / diagonal.sqrt(), phi))


def _join(values: Params) -> Tensor:
    return torch.cat([value.flatten() for value in values.values()]).double()


def _split(vector: Tensor, phi: Params) -> Params:
    parts = torch.split(vector, [value.numel() for value in phi.values()])
    return {n: part.view(like.shape).to(like.dtype) for part, (n, like) in zip(parts, phi.items(), strict=True)}


def _find_rows(inner: Inner, meta: Meta, phi: Params, support: Batch) -> Tensor:
    """Return V, float64, with V^T V the curvature: a row J_i^T r for each column r of the root of each sample's F_i."""
    n = count_samples(support)

    def output(phi: Params) -> Tensors:
        with _draw(inner, support):
            return inner.loss.output(effective_params(inner, meta, phi), support.x)  # type: ignore[attr-defined,no-any-return]

    found, pull, *_ = torch.func.vjp(output, phi)
    rows = []
    for column in _list_columns(inner, found, support):
        for i in range(n):
            own = (torch.arange(n) == i).to(first_tensor(column).device)
            rows.append(_join(pull(map_tensors(lambda one, own=own: _keep(one, own), column))[0]))
    return torch.stack(rows)


def _draw(inner: Inner, support: Batch) -> AbstractContextManager[None]:
    """Return a context in which a view or a loss draws by key; no view and no evaluation draws torch's own numbers."""
    kinds = (inner.rule.random, getattr(inner.loss, "random", False))
    return keyed(support, INIT_STEP, "posterior", inner.seed) if "keyed" in kinds else nullcontext()


def _list_columns(inner: Inner, output: Tensors, support: Batch) -> list[Tensors]:
    """Return the columns of the samples' roots, each like the output, times the roots of the samples' weights."""
    root = inner.loss.answer_outcome.root(output, support.y)  # type: ignore[attr-defined]  # a ModelLoss
    if support.weight is not None:
        weight = support.weight.sqrt()
        root = map_tensors(lambda one: _keep(one * _fit(weight, one).to(one.dtype), weight > 0), root)
    return [map_tensors(lambda one, r=r: one[..., r], root) for r in range(first_tensor(root).shape[-1])]


def _keep(values: Tensor, rows: Tensor) -> Tensor:
    """Return ``values`` (n, ...) with zeros in all but some ``rows`` (n,)."""
    return torch.where(_fit(rows, values), values, 0.0)


def _fit(row: Tensor, values: Tensor) -> Tensor:
    return row.reshape(-1, *[1] * (values.ndim - 1))


class _Layer(NamedTuple):
    """A linear layer whose curvature is the Kronecker product of two matrices, both float64.

    Attributes:
        weight: the name of its weight.
        bias: the name of its bias, None if none adapts.
        inputs: A, (d, d), with a last row and column for the bias.
        outputs: G, (k, k).
    """

    weight: str
    bias: str | None
    inputs: Tensor
    outputs: Tensor


def _join_layers(layers: list[_Layer], phi: Params, strength: float | Tensor) -> PrecisionMatrix:
    def log_det() -> Tensor:
        each = [_multiply(torch.linalg.eigvalsh(one.outputs), torch.linalg.eigvalsh(one.inputs)) for one in layers]
        return torch.stack([(products + strength).log().sum() for products in each]).sum()

    def deviate(noise: Params) -> Params:
        found: Params = {}
        for layer in layers:
            (sizes, left), (others, right) = torch.linalg.eigh(layer.outputs), torch.linalg.eigh(layer.inputs)
            parts = [noise[layer.weight], *([] if layer.bias is None else [noise[layer.bias][:, None]])]
            # The symmetric root does not depend on which eigenvectors of equal eigenvalues are found.
            turned = left.mT @ torch.cat(parts, 1).double() @ right
            moved = left @ (turned / (_multiply(sizes, others) + strength).sqrt()) @ right.mT
            found[layer.weight] = moved[:, : noise[layer.weight].shape[1]]
            if layer.bias is not None:
                found[layer.bias] = moved[:, -1]
        return {name: found[name].to(value.dtype) for name, value in phi.items()}

    return PrecisionMatrix(log_det, deviate)


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    """Return the products (k, d) of the eigenvalues of two matrices, which rounding may have made negative."""
    return left.clamp_min(0.0)[:, None] * right.clamp_min(0.0)


class _LinearCalls(TorchFunctionMode):
    """Watches the calls of ``F.linear`` with the weights of phi, and adds a shift to what each returns."""

    def __init__(self, phi: Params, shifts: Params) -> None:
        self._phi, self._names, self._shifts = phi, {id(value): name for name, value in phi.items()}, shifts
        self.inputs: Params = {}
        self.biases: dict[str, str] = {}
        self.refused: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [*args, *(kwargs or {}).values()]
        used = [self._names[id(one)] for one in given if id(one) in self._names]
        if not (used and isinstance(result, Tensor)):
            return result
        name, *bias = used
        fits = func is F.linear and name in self._shifts and given[1] is self._phi[name]
        again = name in self.inputs or bool(self.biases.keys() & {*bias})
        if again or not fits or result.shape != self._shifts[name].shape:
            self.refused.update(used)
            return result
        self.inputs[name] = given[0]
        self.biases |= dict.fromkeys(used[1:], name)
        return result + self._shifts[name]


def _find_layers(inner: Inner, meta: Meta, phi: Params, support: Batch) -> list[_Layer]:
    n = count_samples(support)
    some = next(iter(phi.values()))
    biases: dict[str, str] = {}

    def output(shifts: Params) -> tuple[Tensors, Params]:
        with _draw(inner, support):
            params = effective_params(inner, meta, phi)
        with _LinearCalls(phi, shifts) as calls:
            found = inner.loss.output(params, support.x)  # type: ignore[attr-defined]  # a ModelLoss
        unfit = sorted((phi.keys() - calls.inputs.keys() - calls.biases.keys()) | calls.refused)
        if unfit:
            raise ValueError(
                f'curvature = "kron" needs weights of torch.nn.Linear layers that are called once, with one row a '
                f'sample, and {", ".join(unfit)} adapt otherwise: use curvature = "diag", or "full" for at most '
                f"{MOST_WEIGHTS:,} weights, or let the linear layers adapt alone, such as fast = ['head.*']"
            )
        biases.update({weight: bias for bias, weight in calls.biases.items()})
        return found, calls.inputs

    shifts = {name: some.new_zeros(n, len(value)) for name, value in phi.items() if value.ndim == 2}
    result: Any = torch.func.vjp(output, shifts, has_aux=True)
    found, pull, inputs = result
    total = torch.as_tensor(sum_weights(support))
    total = torch.where(total > 0, total, 1)  # Of padding alone, there is no mean.
    columns = [pull(column)[0] for column in _list_columns(inner, found, support)]
    layers = []
    for name, given in inputs.items():
        own = given.double()
        if name in biases:
            own = torch.cat([own, torch.ones_like(own[:, :1])], 1)
        weighted = own if support.weight is None else own * support.weight[:, None].double()
        gradients = torch.cat([one[name] for one in columns]).double()
        mean = weighted.mT @ own / total
        layers.append(_Layer(name, biases.get(name), mean, gradients.mT @ gradients))
    return layers
