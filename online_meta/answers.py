"""Answer from published meta-parameters: adapt to a support set, and predict. What is scored is what is served."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from online_meta.batches import count_samples, map_tensors
from online_meta.functional.features import compute_features, solve_head
from online_meta.functional.keyed import keyed
from online_meta.functional.model import evaluation_loss
from online_meta.functional.randomness import INIT_STEP
from online_meta.inner import Inner, believe_in_point, fast_weights, find_head
from online_meta.types import Batch, Belief, Component, LossFn, Meta, Outcome, Params, Prediction, State, Tensors

Answers = Callable[[State, Batch, Tensors], dict[str, Prediction]]
"""(what a learner publishes, a support set, inputs) -> predictions by suffix of the learner's name; a pure function.

"" is the learner's own answer, "@10" that after 10 inner steps, "@ridge_head" that of another head; see
``Inner.answer_steps`` and ``Inner.answer_heads``.
"""

RULE = "rule."
"""Prefix of the names of the inner rule's parameters in what a learner publishes; weights have their own names."""


class MetaNames(NamedTuple):
    """The names of meta-parameters in their order, in which a random rule draws; a file may have another one."""

    weights: tuple[str, ...]
    rule: tuple[str, ...]


def names_of(meta: Meta) -> MetaNames:
    """Return the names of meta-parameters."""
    return MetaNames(tuple(meta.weights), tuple(meta.rule))


def pack_meta(meta: Meta) -> State:
    """Return meta-parameters as one dict of tensors."""
    return {**meta.weights, **{f"{RULE}{name}": value for name, value in meta.rule.items()}}


def unpack_meta(state: State, names: MetaNames | None = None) -> Meta:
    """Return the meta-parameters that ``pack_meta`` packed.

    Args:
        state: what a learner publishes, with tensors in any order.
        names: those of the meta-parameters, in the order of the result; None to take both from ``state``, where a
            weight whose name begins with ``rule.`` counts as a parameter of the rule.

    Raises:
        KeyError: if one of the ``names`` is missing.
    """
    if names is not None:
        return Meta({name: state[name] for name in names.weights}, {name: state[RULE + name] for name in names.rule})
    rule = {name.removeprefix(RULE): value for name, value in state.items() if name.startswith(RULE)}
    return Meta({name: value for name, value in state.items() if not name.startswith(RULE)}, rule)


ALONE: dict[str, Any] = {"answer_steps": (), "answer_heads": (), "answer_rules": ()}
"""The fields of an inner loop without further answers."""


def answer_once(inner: Inner) -> Inner:
    """Return the inner loop with one answer, at its end, from the meta-parameters' weights."""
    return replace(inner, posterior=believe_in_point, samples=1, **ALONE, begin="weights")


def believe_by_inner_loop(inner: Inner, meta: Meta, support: Batch) -> dict[str, Belief]:
    """Adapt to a support set, without an autograd graph. One trajectory serves all numbers of steps.

    Args:
        inner: the inner loop.
        meta: the meta-parameters.
        support: the support set, of n samples; if n is 0, no step is taken.

    Returns:
        What is believed after ``inner.steps`` steps under "", after each other number k of ``inner.answer_steps`` under
        "@k", after no step, with the head of each rule NAME of ``inner.answer_heads``, under "@NAME", and after k steps
        of a rule NAME of ``inner.answer_rules`` under "@NAMEk".
    """
    with torch.no_grad():
        stops = sorted({inner.steps, *inner.answer_steps, *([0] if inner.answer_heads else [])})
        found = dict(zip(stops, inner.believe(meta, support, stops), strict=True))
        steps = {f"@{k}": found[k] for k in inner.answer_steps if k != inner.steps}
        heads = believe_by_heads(inner.loss, inner.answer_heads, found, support)
        return {"": found[inner.steps], **steps, **heads, **_believe_by_rules(inner, meta, support)}


def _believe_by_rules(inner: Inner, meta: Meta, support: Batch) -> dict[str, Belief]:
    """Adapt to a support set by each of ``inner.answer_rules``, from the same weights."""
    found: dict[str, Belief] = {}
    for name, rule, steps in inner.answer_rules:
        other = replace(inner, rule=rule, **ALONE)
        own, stops = Meta(meta.weights, rule.init(fast_weights(other, meta.weights))), sorted({*steps})
        found |= {f"@{name}{k}": belief for k, belief in zip(stops, other.believe(own, support, stops), strict=True)}
    return found


def believe_by_heads(
    loss: LossFn, names: Sequence[str], found: Mapping[int, Belief], support: Batch
) -> dict[str, Belief]:
    """Replace the head of the believed parameters by those that rules make of a support set in closed form.

    The rules have their initial parameters.

    Args:
        loss: of the model, made by ``om.model_loss``.
        names: the rules, such as "ridge_head".
        found: what is believed after numbers of inner steps, of which that after 0 steps counts; needed if there are
            ``names``.
        support: the support set; without samples that count, the head stays.

    Returns:
        For each rule NAME what is then believed, under "@NAME".

    Raises:
        ValueError: if the model has no head, or a rule makes none for its targets.
    """
    if not names:
        return {}
    rules, (params, log_weights) = {name: find_head(name) for name in names}, found[0]
    replaced: dict[str, list[Params]] = {name: [] for name in names}
    for sample in range(len(log_weights)):
        own = {name: values[sample] for name, values in params.items()}
        features = compute_features(loss, own, support.x) if count_samples(support) else None
        for name, (rule, head) in rules.items():
            replaced[name].append(solve_head(loss, head, rule.init(own), own, support, features))
    return {
        f"@{name}": Belief({**params, **map_tensors(lambda *each: torch.stack(each), *heads)}, log_weights)
        for name, heads in replaced.items()
    }


def bind_meta(inner: Inner, meta: Meta) -> Callable[[Batch], Belief]:
    """Return the function that adapts ``meta`` to a support set by the inner loop."""
    return lambda support: believe_by_inner_loop(inner, meta, support)[""]


def predict_each(inner: Inner, beliefs: dict[str, Belief], support: Batch, x: Tensors) -> dict[str, Prediction]:
    """Return the prediction for ``x`` under each belief, by the same names.

    A model that draws by key draws numbers of the support set, the same for every belief.
    """
    keyed_loss = getattr(inner.loss, "random", False) == "keyed"
    found = {}
    with torch.no_grad():
        for suffix, belief in beliefs.items():
            with keyed(support, INIT_STEP, "answer", inner.seed) if keyed_loss else nullcontext():
                found[suffix] = predict(inner.loss, belief, x)
    return found


def answer_by_inner_loop(inner: Inner, meta: Meta, support: Batch, x: Tensors) -> dict[str, Prediction]:
    """Adapt to a support set by an inner loop, and predict; the names are those of ``believe_by_inner_loop``."""
    return predict_each(inner, believe_by_inner_loop(inner, meta, support), support, x)


def predict(loss: LossFn, belief: Belief, x: Tensors) -> Prediction:
    """Return the prediction for ``x`` under each of the believed parameters, as one component."""
    model = _find_model(loss, x)
    samples = [{name: values[s] for name, values in belief.params.items()} for s in range(len(belief.log_weights))]
    outputs = [model.output(params, x) for params in samples]
    stacked = map_tensors(lambda *each: torch.stack(each), *outputs) if len(outputs) > 1 else _add_dimension(outputs[0])
    return (Component(model.outcome, stacked, belief.log_weights),)


def _add_dimension(output: Tensors) -> Tensors:
    return output[None] if isinstance(output, Tensor) else map_tensors(lambda tensor: tensor[None], output)


class _Model(NamedTuple):
    """A model in evaluation mode: its output, and what the output means."""

    output: Callable[[Params, Tensors], Tensors]
    outcome: Outcome


def _find_model(loss: LossFn, x: Tensors) -> _Model:
    """Return the model behind a loss.

    Of a plain function of (parameters, batch) no output is known: its parameters themselves are the output, and the
    outcome calls the function with them.
    """
    output = getattr(loss, "answer", None)
    if output is not None:
        return _Model(output, loss.answer_outcome)  # type: ignore[attr-defined]  # a ModelLoss
    evaluate = evaluation_loss(loss)

    def judge(output: Tensors, y: Tensors) -> Tensor:
        assert isinstance(output, dict)
        return evaluate(output, Batch(x, y))

    def refuse(*arguments: object) -> Tensor:
        raise ValueError("a loss of parameters and a batch gives no output to predict with: make it with om.model_loss")

    return _Model(lambda params, x: params, Outcome(nll=refuse, mean=refuse, loss=judge))
