"""Amortised adaptation: an encoder of the support set makes what adapts, without a gradient (neural processes)."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from online_meta.batches import as_named, count_samples, sum_weights
from online_meta.functional.keyed import keyed, normal_like_all
from online_meta.functional.normals import draw_normal
from online_meta.functional.randomness import INIT_STEP
from online_meta.rules.sgd import sgd
from online_meta.types import Batch, Carry, Inference, InnerRule, Normal, Params, Tensors

KEYS, VALUES = "keys", "values"
"""The names of the weights that attention reads; see ``trainers.models.attentive_decoder``."""

ROWS = "rows"
"""The name of the weights that have support samples as they are; see ``trainers.models.in_context_transformer``."""

Prior = Literal["support", "standard"]
"""What training takes for the prior of c, the weights that are drawn: a belief given the support set, or N(0, I).

With N(0, I), the rule is a neural statistician (Edwards & Storkey, ICLR 2017): c is a code of a set D' of n samples y_i
with a constant x. The estimator ``variational`` descends

    -1/n E_q(c | D')[sum_i log p(y_i | x, c)] + 1/n KL(q(c | D') || N(0, I)).

Without samples, c is drawn from N(0, I). The paper has a latent variable z_i of each sample, with a bound of its own.
Here z_i is discrete: the component of the outcome ``gaussian_mixture``, over which the sum is exact. So z adds no
divergence, and needs no network.
"""

UNCOUNTED = -1e4
"""Takes the place of the logarithm of a weight of 0: its exponential is 0."""


def encode(
    lr: float = 0.01,
    width: int = 64,
    depth: int = 2,
    features: int = 16,
    attention: bool = False,
    latent: bool = False,
    in_context: bool = False,
    prior: Prior = "support",
    pooled_depth: int = 0,
) -> InnerRule:
    """Return the rule phi_0 = w + A mean_i h(x_i, y_i): a conditional neural process (Garnelo et al., ICML 2018).

    w are the weights that adapt. The perceptron h and the matrix A are what the rule learns. Use it with ``steps`` = 0,
    ``fast = ["context"]`` and a model that reads a context with each input, such as ``trainers.models:mlp`` with
    ``context = 64``, the decoder of a neural process. Any weights can be made like this, for example those of the last
    layer. Without support samples the mean r is 0, so w is the context before any data. Gradient descent may follow.

    With ``latent``, phi_0 is drawn by key from N(w + A r, s^2), s = 0.1 + 0.9 sigmoid(b + B r), with b and B learned: a
    neural process (Garnelo et al., 2018, "Neural Processes"). Use it with the posterior "samples", and with the
    estimator ``variational``, or with ``exact``. With ``prior = "standard"``: a neural statistician; see ``Prior``.

    With ``attention``, the rows k(x_i) and v(x_i, y_i) are added to the weights ``keys`` and ``values`` of the model,
    which looks them up for each query input, such as ``trainers.models:attentive_decoder``: an attentive neural process
    (Kim et al., ICLR 2019). The last column of the keys is the logarithm of the weight of the sample. The rows that the
    model has itself are what it looks up before any data.

    With ``in_context``, the rows (x_i, y_i, the logarithm of the weight) are added to the weights ``rows`` of the model
    as they are. The model learns from them by itself, such as ``trainers.models:in_context_transformer``: a transformer
    neural process (Nguyen & Grover, ICML 2022) or prior-fitted network (Müller et al., ICLR 2022).

    Args:
        lr: inner learning rate of the steps, above 0.
        width: of the hidden layers, at least 1.
        depth: the number of hidden layers of h and of k, at least 1.
        features: the number of entries of x, and of y, to distinguish, at least 1. Entries at a distance of a multiple
            are summed with alternating signs (Weinberger et al., ICML 2009). Integers, but bytes, are categories.
        attention: whether support samples become rows of ``keys`` and ``values``, which ``fast`` has to match.
        latent: whether all other weights that adapt are drawn.
        in_context: whether support samples become ``rows``, which ``fast`` has to match.
        prior: with ``latent``, the prior of training: "support" for what is believed given the support set, or
            "standard" for standard normal numbers.
        pooled_depth: the number of hidden layers between the mean and A, at least 0.

    Returns:
        The rule. Its learned parameters start as a function of the weights' bits.

    Raises:
        ValueError: if an option is out of range; later, if it does not fit the weights that adapt.
    """
    encoder = Encoder(width, depth, features, attention, latent, in_context, prior, pooled_depth)
    return sgd(lr)._replace(
        init=encoder.init,
        start=encoder.start,
        random="keyed" if latent else False,
        infer=encoder.infer() if latent else None,
    )


@dataclass(frozen=True)
class Encoder:
    """The shapes of an encoder, whose parameters are given to each function; see ``encode``."""

    width: int
    depth: int
    features: int
    attention: bool
    latent: bool
    in_context: bool
    prior: Prior
    pooled_depth: int

    def __post_init__(self) -> None:
        """Check the options."""
        for option in ("width", "depth", "features"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option} is {getattr(self, option)}: it is 1 or more")
        if self.pooled_depth < 0:
            raise ValueError(f"pooled_depth is {self.pooled_depth}: it is 0 or more")
        if self.prior not in get_args(Prior):
            raise ValueError(f"prior is {self.prior!r}: it is one of {', '.join(get_args(Prior))}")
        if self.prior == "standard" and not self.latent:
            raise ValueError('prior = "standard" is that of what is drawn: set latent = true')

    def init(self, weights: Params) -> Params:
        """Return initial parameters for the weights that adapt, as a function of their bits."""
        hidden, pooled = [self.width] * self.depth, self._pooled(weights)
        shapes: dict[str, tuple[int, ...]] = {}
        if self.attention or pooled:
            shapes |= _list_layers("samples", [2 * self.features, *hidden])
        if self.in_context:
            _require_context(weights, self.features)
        if self.attention:
            _require_keys(weights)
            shapes |= _list_layers(KEYS, [self.features, *hidden, weights[KEYS].shape[1] - 1])
            shapes |= _list_layers(VALUES, [self.width, weights[VALUES].shape[1]])
        if self.latent and not pooled:
            raise ValueError(
                "encode with latent = true draws the weights that adapt, other than keys and values, and there are "
                'none: add them to fast, such as fast = ["context", "keys", "values"]'
            )
        if pooled:
            shapes |= _list_layers("pooled", [self.width] * (1 + self.pooled_depth))
        for name, weight in pooled.items():
            shapes[f"{name}.mean.weight"] = (weight.numel(), self.width)
            if self.latent:
                shapes |= {
                    f"{name}.spread.weight": (weight.numel(), self.width),
                    f"{name}.spread.bias": (weight.numel(),),
                }
        return _draw_layers(shapes, weights)

    def _pooled(self, weights: Params) -> Params:
        """Return the weights that are made of the mean over the samples."""
        rows = (*((KEYS, VALUES) if self.attention else ()), *((ROWS,) if self.in_context else ()))
        return {name: weight for name, weight in weights.items() if name not in rows}

    def start(self, rule: Params, phi: Params, support: Batch) -> Carry:
        """Return the weights that are made of the support set."""
        believed = self.believe(rule, phi, support, {})
        made = draw_normal(believed) if self.latent else believed.mean
        return Carry({**phi, **made, **self.add_rows(rule, phi, support)}, {})

    def infer(self) -> Inference:
        """Return what training draws from, and its prior."""
        if self.prior == "standard":
            return Inference(self._presume, self.believe, evidence="query", sees="samples")
        return Inference(self.believe, self.believe, evidence="both", sees="samples")

    def _presume(self, rule: Params, phi: Params, batch: Batch, grads: Params) -> Normal:
        """Return a standard normal distribution of the weights that are drawn."""
        zeros = {name: torch.zeros_like(value) for name, value in self._pooled(phi).items()}
        return Normal(zeros, zeros)

    def believe(self, rule: Params, phi: Params, batch: Batch, grads: Params) -> Normal:
        """Return the distribution of the weights that are made of the mean; without ``latent``, its mean alone."""
        if not self._pooled(phi):
            return Normal({}, {})
        code = _average(self._encode_samples(rule, phi, batch), batch)
        code = F.gelu(_run_layers("pooled", rule, code)) if self.pooled_depth else code
        found = Normal({}, {})
        for name, value in self._pooled(phi).items():
            found.mean[name] = value + (rule[f"{name}.mean.weight"] @ code).reshape(value.shape)
            if self.latent:
                raw = rule[f"{name}.spread.bias"] + rule[f"{name}.spread.weight"] @ code
                found.log_std[name] = (0.1 + 0.9 * raw.sigmoid()).log().reshape(value.shape)
        return _keep_if_counted(found, batch) if self.prior == "standard" else found

    def add_rows(self, rule: Params, phi: Params, support: Batch) -> Params:
        """Return the weights that have a row for each support sample."""
        found = {}
        if self.in_context:
            given = self._read_samples(phi, support)
            found[ROWS] = torch.cat([phi[ROWS], torch.cat([given, _log_weights(support, given)], 1)])
        if not self.attention:
            return found
        keys = _run_layers(KEYS, rule, _fold(support.x, self.features, phi[KEYS]))
        values = _run_layers(VALUES, rule, self._encode_samples(rule, phi, support))
        keys = torch.cat([keys, _log_weights(support, keys)], 1)
        return found | {KEYS: torch.cat([phi[KEYS], keys]), VALUES: torch.cat([phi[VALUES], values])}

    def _encode_samples(self, rule: Params, phi: Params, batch: Batch) -> Tensor:
        """Return h(x_i, y_i) for each sample, (n, width)."""
        return F.gelu(_run_layers("samples", rule, self._read_samples(phi, batch)))

    def _read_samples(self, phi: Params, batch: Batch) -> Tensor:
        """Return the numbers of x and y of each sample, (n, 2 features)."""
        like = next(iter(phi.values()))
        return torch.cat([_fold(part, self.features, like) for part in (batch.x, batch.y)], 1)


def _require_context(weights: Params, features: int) -> None:
    """Raise ``ValueError`` unless there are rows to which samples can be added."""
    found = tuple(weights[ROWS].shape) if ROWS in weights else "missing"
    if found == "missing" or found[1:] != (2 * features + 1,):
        raise ValueError(
            f"encode with in_context = true and features = {features} needs weights rows (m, {2 * features + 1}) that "
            f"adapt, and they are {found}: take trainers.models:in_context_transformer with features = {features}, and "
            'fast = ["rows"]'
        )


def _require_keys(weights: Params) -> None:
    """Raise ``ValueError`` unless there are keys and values to which rows can be added."""
    found = {name: tuple(weights[name].shape) for name in (KEYS, VALUES) if name in weights}
    shapes = [*found.values()]
    if len(found) < 2 or any(len(shape) != 2 for shape in shapes) or shapes[0][0] != shapes[1][0] or shapes[0][1] < 2:
        raise ValueError(
            f"encode with attention = true needs weights keys (m, k + 1) and values (m, v) that adapt, and they are "
            f'{found or "missing"}: take trainers.models:attentive_decoder, with fast = ["keys", "values"]'
        )


def _list_layers(name: str, sizes: list[int]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights of linear layers between ``sizes``."""
    found: dict[str, tuple[int, ...]] = {}
    for layer, (before, after) in enumerate(pairwise(sizes)):
        found |= {f"{name}.{layer}.weight": (after, before), f"{name}.{layer}.bias": (after,)}
    return found


def _draw_layers(shapes: dict[str, tuple[int, ...]], weights: Params) -> Params:
    """Draw matrices that keep the size of what they are given, as a function of ``weights``; biases are 0."""
    if not shapes:
        return {}
    some = next(iter(weights.values()))
    empty = {name: some.new_zeros(shape) for name, shape in shapes.items()}
    with keyed(Batch(weights, {}), INIT_STEP, "begin"):
        noise = normal_like_all({name: value for name, value in empty.items() if value.ndim == 2})
    # What the first layers read has a size of about 1 already, however many places there are.
    first = {"samples.0.weight", f"{KEYS}.0.weight"}
    scales = {name: 1.0 if name in first else 1 / math.sqrt(value.shape[1]) for name, value in noise.items()}
    return {name: scales[name] * noise[name] if name in noise else value for name, value in empty.items()}


def _run_layers(name: str, rule: Params, values: Tensor) -> Tensor:
    """Return the output (n, outputs) of the linear layers called ``name``, with GELU between them."""
    layer = 0
    while f"{name}.{layer}.weight" in rule:
        values = F.gelu(values) if layer else values
        values = F.linear(values, rule[f"{name}.{layer}.weight"], rule[f"{name}.{layer}.bias"])
        layer += 1
    return values


def _average(values: Tensor, batch: Batch) -> Tensor:
    """Return the weighted mean (d,) of the rows; zeros if no row counts."""
    if batch.weight is None:
        return values.sum(0) / max(len(values), 1)
    weight = batch.weight.to(values.dtype)
    total = weight.sum()
    return (weight[:, None] * values).sum(0) / torch.where(total > 0, total, 1.0)


def _keep_if_counted(found: Normal, batch: Batch) -> Normal:
    """Return ``found``, or a standard normal distribution if no sample of the batch counts."""
    counted = sum_weights(batch) > 0
    if counted is True:
        return found
    return Normal(
        *({name: torch.where(torch.as_tensor(counted), value, 0.0) for name, value in part.items()} for part in found)
    )


def _log_weights(batch: Batch, like: Tensor) -> Tensor:
    """Return the logarithm of the weight of each sample, (n, 1)."""
    if batch.weight is None:
        return like.new_zeros(count_samples(batch), 1)
    weight = batch.weight.to(like.dtype)[:, None]
    return torch.where(weight > 0, torch.where(weight > 0, weight, 1.0).log(), UNCOUNTED)


def _fold(tensors: Tensors, places: int, like: Tensor) -> Tensor:
    """Return the numbers of each sample in ``places`` places, (n, places), in the dtype of ``like``.

    Number j is in place j modulo ``places``, with the sign (-1)^(j // places). A category c in place j counts 1 in
    place (c + j) modulo ``places``. Both are divided by the root of their number.
    """
    numbers, categories = [], []
    for tensor in as_named(tensors).values():
        value = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        value = value.flatten(1) if value.ndim > 1 else value[:, None]
        if value.dtype == torch.uint8:
            numbers.append(value.to(like.dtype) / 255)
        elif value.is_floating_point() or value.dtype == torch.bool:
            numbers.append(value.to(like.dtype))
        else:
            categories.append(value)
    found = like.new_zeros(len(next(iter(as_named(tensors).values()))), places)
    if numbers:
        flat = torch.cat(numbers, 1)
        size = flat.shape[1]
        rows = F.pad(flat, (0, -size % places)).reshape(len(flat), -(-size // places), places)
        signs = 1.0 - 2.0 * (torch.arange(rows.shape[1], device=like.device) % 2).to(like.dtype)
        found = found + (signs[:, None] * rows).sum(1) / math.sqrt(max(size, 1))
    if categories:
        flat = torch.cat(categories, 1)
        size = flat.shape[1]
        at = (flat + torch.arange(size, device=flat.device)) % places
        counts = (at[..., None] == torch.arange(places, device=flat.device)).to(like.dtype)
        found = found + counts.sum(1) / math.sqrt(max(size, 1))
    return found
