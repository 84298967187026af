"""The inner loop: adapt meta-parameters to one task."""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import reduce
from itertools import pairwise
from operator import add
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from online_meta import registry, rules
from online_meta.batches import count_samples, first_tensor, map_tensors, sum_weights
from online_meta.functional.autodiff import outside_inference_mode, value_and_gradient
from online_meta.functional.double_backward import math_attention
from online_meta.functional.features import solve_head
from online_meta.functional.keyed import Role, draw_alike, keyed
from online_meta.functional.randomness import INIT_STEP, seeded
from online_meta.functional.stateless import select_learned
from online_meta.prediction import loss_of
from online_meta.types import Batch, Belief, Carry, Component, HeadSolver, InnerRule, LossFn, Meta, Params, Seen

Posterior = Callable[["Inner", Meta, Batch, int, Sequence[int]], tuple[Belief, ...]]
"""(inner, meta, support, samples, stops) -> what is believed after each number of inner steps in ``stops``.

``online_meta/posteriors`` has them; its docstring says what they keep.
"""


def believe_in_point(
    inner: "Inner", meta: Meta, support: Batch, samples: int, stops: Sequence[int]
) -> tuple[Belief, ...]:
    """Return the belief in the end of the inner loop alone, for each stop: the posterior ``point``."""
    if samples != 1:
        raise ValueError(f'samples is {samples}: posterior = "point" has 1 sample; use "samples" for more')
    return tuple(
        weigh_equally([view_adapted(inner, meta, carry.phi, support)])
        for carry in run_trajectory(inner, meta, support, stops)
    )


def weigh_equally(samples: Sequence[Params]) -> Belief:
    """Return the belief in several sets of parameters, each of which is as likely."""
    params = map_tensors(lambda *each: torch.stack(each) if len(each) > 1 else each[0][None], *samples)
    some = next(iter(params.values()))
    dtype = torch.promote_types(some.dtype.to_real(), torch.float32)
    log_weights = some.new_zeros(len(samples), dtype=dtype)
    return Belief(params, torch.log_softmax(log_weights, 0) if len(samples) > 1 else log_weights)


class AnswerRule(NamedTuple):
    """Another inner rule to answer by: its name in answers, such as "adam" of "@adam10", and the numbers of steps."""

    name: str
    rule: InnerRule
    steps: tuple[int, ...]


@dataclass(frozen=True)
class Inner:
    """The inner loop phi_0 = start(fast weights of w, support), phi_{k+1} = update(phi_k, L(phi_k), grad L(phi_k)).

    With ``rules.sgd`` this is MAML (Finn et al., ICML 2017). The random numbers of a ``random`` loss or rule are a
    function of the task and the step.

    Attributes:
        loss: the model as a ``LossFn``.
        rule: the inner update rule, e.g. ``rules.sgd(lr=0.01)``.
        steps: the number of inner steps K, at least 0.
        fast: globs of the names of the weights that adapt. ("*",) adapts all; with a model of parts "body" and "head",
            ("head.*",) is ANIL (Raghu et al., ICLR 2020) and ("body.*",) is BOIL (Oh et al., ICLR 2021).
        posterior: what is believed of a task after adapting, e.g. ``posteriors.samples()``.
        samples: the number of samples of a belief, at least 1.
        answer_steps: further numbers of inner steps to answer after, each at least 0.
        answer_heads: names of rules with a ``head``, such as "ridge_head": further answers take no step, and replace
            the head of the model.
        answer_rules: further answers by other inner rules, which begin at the same weights with their own initial
            parameters.
        seed: of the numbers that are drawn by key, an integer of 64 bits.
        begin: "weights": each task starts from the meta-parameters' weights; "fresh": from weights of its own, drawn
            like an initialisation of the model, as learned optimizers need. The weights that adapt are then not
            learned.

    Raises:
        ValueError: if a number is out of range, or a field of the rule has none of its values.
    """

    loss: LossFn
    rule: InnerRule
    steps: int = 5
    fast: tuple[str, ...] = ("*",)
    posterior: Posterior = believe_in_point
    samples: int = 1
    answer_steps: tuple[int, ...] = ()
    seed: int = 0
    begin: Literal["weights", "fresh"] = "weights"
    answer_heads: tuple[str, ...] = ()
    answer_rules: tuple[AnswerRule, ...] = ()

    def __post_init__(self) -> None:
        """Check the numbers and the rule."""
        if self.steps < 0:
            raise ValueError(f"steps is {self.steps}: an inner loop takes 0 steps or more")
        if any(steps < 0 for steps in self.answer_steps):
            raise ValueError(f"answer_steps are {[*self.answer_steps]}: each is 0 or more")
        for name in self.answer_heads:
            find_head(name)
        for other in self.answer_rules:
            if not other.steps or min(other.steps) < 0:
                raise ValueError(
                    f"steps of the answers by {other.name!r} are {[*other.steps]}: give some of at least 0"
                )
        if self.samples < 1:
            raise ValueError(f"samples is {self.samples}: a belief has 1 sample or more")
        if self.rule.sees not in ("gradient", "loss"):
            raise ValueError(f'the rule sees {self.rule.sees!r}: a rule sees the "gradient" or the "loss" alone')
        if self.begin not in ("weights", "fresh"):
            raise ValueError(f'begin is {self.begin!r}: it is "weights" or "fresh"')
        if self.rule.random not in (True, False, "keyed"):
            raise ValueError(f'the rule\'s random is {self.rule.random!r}: it is True, False or "keyed"')

    @outside_inference_mode
    def init(self, weights: Params) -> Meta:
        """Return initial meta-parameters: detached copies of ``weights`` and the rule's initial parameters.

        Weights that the loss has frozen are left out; of a tied weight's names, the first is kept. So
        ``module.state_dict()`` serves for a module without buffers. Raises ``ValueError`` if all weights are frozen, if
        a glob of ``fast`` matches no weight, if a weight is not floating-point, and, with a loss of ``om.model_loss``,
        if the names and shapes are not those of the model's weights.
        """
        frozen: frozenset[str] = getattr(self.loss, "frozen", frozenset())
        if frozen and not weights.keys() - frozen:
            raise ValueError("the model has no weight to learn: all are frozen (requires_grad is False)")
        tensors = getattr(self.loss, "tensors", None)
        weights = select_learned(tensors, weights) if tensors else {n: w for n, w in weights.items() if n not in frozen}
        discrete = [name for name, value in weights.items() if not (value.is_floating_point() or value.is_complex())]
        if discrete:
            raise ValueError(f"{', '.join(discrete)} are integers, of which there is no gradient: they are no weights")
        for pattern in self.fast:
            if not any(fnmatchcase(name, pattern) for name in weights):
                raise ValueError(f"fast = {pattern!r} matches none of the weights {sorted(weights)}")
        copies = {name: value.detach().clone() for name, value in weights.items()}
        return Meta(copies, self.rule.init(fast_weights(self, copies)))

    @outside_inference_mode
    def adapt(self, meta: Meta, support: Batch) -> Params:
        """Return the model's parameters after adapting to ``support``, without an autograd graph.

        If the rule draws random numbers, it is the first sample of what is believed.
        """
        with torch.no_grad():
            return view_adapted(self, meta, run_inner_loop(self, meta, support).phi, support)

    @outside_inference_mode
    def believe(self, meta: Meta, support: Batch, stops: Sequence[int] | None = None) -> tuple[Belief, ...]:
        """Return what is believed of a task after adapting to ``support``, without an autograd graph.

        Args:
            meta: the meta-parameters.
            support: the support set; one of 0 rows takes no step.
            stops: numbers of inner steps, at least 0 and ascending; None for ``steps`` alone.

        Returns:
            A belief for each stop, of ``samples`` samples, all from one trajectory of each sample.

        Raises:
            ValueError: if the posterior does not fit the rule, or the stops do not ascend.
        """
        with torch.no_grad():
            return self.posterior(self, meta, support, self.samples, (self.steps,) if stops is None else stops)


def find_head(name: str) -> tuple[InnerRule, HeadSolver]:
    """Return a rule and its head. Raises ``ValueError`` if no rule has the name, or the rule has no head."""
    rule: InnerRule = registry.load(rules, name)()
    if rule.head is None:
        heads = [known for known in registry.names(rules) if registry.load(rules, known)().head]
        raise ValueError(f"the inner rule {name!r} makes no head in closed form: {registry.nearest(name, heads)}")
    return rule, rule.head


def draws_numbers(inner: Inner) -> bool:
    """Return whether the model or a rule draws torch's random numbers, which are seeded with the task."""
    rules = (inner.rule, *(other.rule for other in inner.answer_rules))
    return True in (getattr(inner.loss, "random", False), *(rule.random for rule in rules))


def fast_weights(inner: Inner, weights: Params) -> Params:
    """Return the weights that adapt, by name."""
    return {n: w for n, w in weights.items() if any(fnmatchcase(n, glob) for glob in inner.fast)}


def slow_weights(inner: Inner, weights: Params) -> Params:
    """Return the weights that the inner loop does not change, by name."""
    fast = fast_weights(inner, weights)
    return {n: w for n, w in weights.items() if n not in fast}


def effective_params(inner: Inner, meta: Meta, phi: Params) -> Params:
    """Return the parameters that the model is called with: the rule's view of the slow weights and ``phi``."""
    return inner.rule.view(meta.rule, {**meta.weights, **phi})


def effective_particles(inner: Inner, meta: Meta, phi: Params) -> Sequence[Params]:
    """Return the parameters of every model that adapts: one, or as many as the rule has particles."""
    if inner.rule.particles is None:
        return [effective_params(inner, meta, phi)]
    return inner.rule.particles(meta.rule, {**meta.weights, **phi})


def view_adapted(inner: Inner, meta: Meta, phi: Params, support: Batch) -> Params:
    """Return the parameters that the model is called with after adapting to ``support``; a random view draws once."""
    with drawing(inner, support, INIT_STEP, "posterior"):
        return effective_params(inner, meta, phi)


def choose_start(inner: Inner, meta: Meta, support: Batch) -> Params:
    """Return the weights that the rule's ``start`` is given: those that adapt, or fresh ones of ``begin`` = "fresh".

    A fresh weight is normal with the mean and the standard deviation of the entries of that in ``meta``, which is held
    constant. A weight whose entries are all equal, such as a bias of zeros, stays as it is. Of a rule with a ``head``,
    the head is then replaced by what it makes of the support set, which depends on all weights.
    """
    fast = fast_weights(inner, meta.weights)
    if inner.begin == "fresh" and fast:
        fast = draw_alike({name: value.detach() for name, value in fast.items()})
    if inner.rule.head is None:
        return fast
    head = solve_head(inner.loss, inner.rule.head, meta.rule, effective_params(inner, meta, fast), support)
    if lost := head.keys() - fast.keys():
        raise ValueError(
            f"the inner rule replaces {', '.join(sorted(lost))}, the head of the model: fast = {[*inner.fast]} must "
            "match it, as ['*'] does"
        )
    return {**fast, **head}


def init_carry(inner: Inner, meta: Meta, support: Batch) -> Carry:
    """Return the carry before the first step: phi_0 and the rule's initial state.

    Raises ``ValueError`` if the rule's ``start`` leaves out a weight that adapts.
    """
    with drawing(inner, support, INIT_STEP, "begin"):
        fast = choose_start(inner, meta, support)
        carry = inner.rule.start(meta.rule, fast, support)
    if lost := fast.keys() - carry.phi.keys():
        raise ValueError(
            f"the inner rule's start leaves out {', '.join(sorted(lost))}: phi_0 has every weight that adapts, and may "
            "have further names"
        )
    return carry


def see_support(inner: Inner, meta: Meta, phi: Params, support: Batch, k: int) -> Seen:
    """Return what inner step ``k`` sees: the loss L(phi) on the support set, and grad L(phi) if the rule sees it.

    Both can be differentiated again.
    """
    size = sum_weights(support)
    if inner.rule.sees == "loss":
        return Seen(support_loss(inner, meta, phi, support, k), {}, size)
    with drawing(inner, support, k + 1, "step"):
        return Seen(*value_and_gradient(lambda phi: _add_losses(inner, meta, phi, support), phi), size)


def support_loss(inner: Inner, meta: Meta, phi: Params, support: Batch, k: int) -> Tensor:
    """Return the loss L(phi) on the support set at inner step ``k``."""
    with drawing(inner, support, k + 1, "step"):
        return _add_losses(inner, meta, phi, support)


def _add_losses(inner: Inner, meta: Meta, phi: Params, support: Batch) -> Tensor:
    """Return the sum of the losses of all models, so that the gradient of each is its own."""
    return reduce(add, [inner.loss(params, support) for params in effective_particles(inner, meta, phi)])


def step(inner: Inner, meta: Meta, carry: Carry, support: Batch, k: int) -> Carry:
    """Return the carry after inner step ``k``; a pure, differentiable function.

    ``meta.weights`` needs to hold only the slow weights; the fast ones are read from ``carry``.
    """
    return apply_update(inner, meta, carry, see_support(inner, meta, carry.phi, support, k), support, k)


def apply_update(inner: Inner, meta: Meta, carry: Carry, seen: Seen, support: Batch, k: int) -> Carry:
    """Return the carry after the rule's update ``k``; raise ``ValueError`` if it changes names or shapes."""
    with drawing(inner, support, k + 1, "update"):
        after = inner.rule.update(meta.rule, carry, seen, k)
    if k == 0:  # Once a task: it costs as much as the update of a small model.
        _require_same_tensors("phi", carry.phi, after.phi, k)
        _require_same_tensors("the state", carry.state, after.state, k)
    return after


def _require_same_tensors(part: str, before: Params, after: Params, k: int) -> None:
    if before.keys() != after.keys():
        changed = ", ".join(sorted(before.keys() ^ after.keys()))
        raise ValueError(
            f"the inner rule's update at step {k} adds or leaves out {changed}: {part} keeps the names that it has "
            "after start"
        )
    for name, value in before.items():
        if after[name].shape != value.shape:
            raise ValueError(
                f"the inner rule's update at step {k} changes the shape of {name} from {[*value.shape]} to "
                f"{[*after[name].shape]}: {part} keeps the shapes that it has after start"
            )


def count_steps(inner: Inner, support: Batch) -> int:
    """Return the number of inner steps on a support set: ``inner.steps``, and 0 if the set has no rows."""
    return inner.steps if count_samples(support) else 0


@outside_inference_mode
def run_inner_loop(inner: Inner, meta: Meta, support: Batch) -> Carry:
    """Return the carry after the last step, without an autograd graph. Without support samples no step is taken."""
    return run_trajectory(inner, meta, support, (inner.steps,))[0]


def run_trajectory(inner: Inner, meta: Meta, support: Batch, stops: Sequence[int]) -> tuple[Carry, ...]:
    """Return the carries after each number of steps in ``stops``, from one inner loop without an autograd graph.

    Without support samples no step is taken. Raises ``ValueError`` unless the stops are at least 0 and ascend.
    """
    if not stops or any(b <= a for a, b in pairwise((-1, *stops))):
        raise ValueError(f"the numbers of steps are {[*stops]}: give one or more that ascend, each at least 0")
    with torch.no_grad(), math_attention():  # To select the kernel at each call of the model is slower.
        carry, found = init_carry(inner, meta, support), []
        for k in range(stops[-1] + 1):
            if k in stops:
                found.append(carry)
            if k < stops[-1] and count_steps(inner, support):
                carry = step(inner, meta, carry, support, k)
        return tuple(found)


def query_loss(inner: Inner, meta: Meta, phi: Params, query: Batch) -> Tensor:
    """Return the loss of ``phi`` on the query set, which meta-gradients differentiate.

    That of several particles is the loss of the mixture of their outputs, as in an answer. Of a plain function of
    (parameters, batch), no output is known: it is then the mean of their losses.
    """
    with drawing(inner, query, INIT_STEP, "query"):
        first, *others = effective_particles(inner, meta, phi)
        return _mix_losses(inner.loss, [first, *others], query) if others else inner.loss(first, query)


def _mix_losses(loss: LossFn, particles: Sequence[Params], query: Batch) -> Tensor:
    call = getattr(loss, "call_training", None)
    if call is None:
        return reduce(add, [loss(params, query) for params in particles]) / len(particles)
    outputs = map_tensors(lambda *each: torch.stack(each), *[call(params, query.x) for params in particles])
    log_weights = first_tensor(outputs).new_full((len(particles),), -math.log(len(particles)))
    component = Component(loss.outcome, outputs, log_weights)  # type: ignore[attr-defined]  # a ModelLoss
    return loss_of((component,), query.y, query.weight)


def drawing(inner: Inner, batch: Batch, step: int, role: Role) -> AbstractContextManager[None]:
    """Return a context in which a random rule or loss draws, for a batch, a step and a role; others need none."""
    kinds = {inner.rule.random, getattr(inner.loss, "random", False)}
    if role == "begin" and inner.begin == "fresh":
        kinds.add("keyed")
    return nullcontext() if kinds == {False} else _draw_by(kinds, inner, batch, step, role)


@contextmanager
def _draw_by(kinds: Collection[object], inner: Inner, batch: Batch, step: int, role: Role) -> Iterator[None]:
    with (
        seeded(batch, step) if True in kinds else nullcontext(),
        keyed(batch, step, role, inner.seed) if "keyed" in kinds else nullcontext(),
    ):
        yield
