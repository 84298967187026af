"""The types shared by all packages: data are named tuples of tensors, behaviour is plain callables and protocols."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

Params = dict[str, Tensor]
"""Parameters under flat dotted names, as ``dict(module.named_parameters())`` gives them."""


Tensors = Tensor | Params
"""One tensor, or a flat dict of them: what a model is given, returns or is compared with."""


class _BatchFields(NamedTuple):
    x: Tensors
    y: Tensors
    weight: Tensor | None = None


class Batch(_BatchFields):
    """n samples: inputs ``x`` and labels or targets ``y``, each a tensor (n, ...) or a flat dict of such tensors.

    ``weight`` (n,) says how much each sample counts in a loss; 0 is padding, and None counts all alike. A batch without
    weights unpacks as the pair (x, y), so that only tensors are in it where torch looks into it.
    """

    __slots__ = ()

    def __len__(self) -> int:
        """Return the number of fields that are given: 2 without weights."""
        return 2 if self.weight is None else 3

    def __iter__(self) -> Iterator[Any]:
        """Iterate over x, y and, if it is given, weight."""
        return islice(tuple.__iter__(self), len(self))

    def _replace(self, **changes: Any) -> "Batch":
        """Return a batch with some fields replaced."""
        return Batch(**{**self._asdict(), **changes})

    def _asdict(self) -> dict[str, Any]:
        """Return the fields that are given, by name."""
        return dict(zip(self._fields, self, strict=False))


class Task(NamedTuple):
    """A few-shot task: a model adapts to ``support`` and is scored on ``query``. It has tensors only, so vmap works."""

    support: Batch
    query: Batch


class Meta(NamedTuple):
    """Meta-parameters, which the outer loop learns: the model's ``weights`` and the inner ``rule``'s own parameters."""

    weights: Params
    rule: Params


class MetaGrad(NamedTuple):
    """The query ``loss`` (a scalar) and ``grads``, its gradient or another direction; an optimizer subtracts them."""

    loss: Tensor
    grads: Meta


class Carry(NamedTuple):
    """The state of the inner loop between steps: the fast weights ``phi`` and the inner rule's ``state``."""

    phi: Params
    state: Params


LossFn = Callable[[Params, Batch], Tensor]
"""The model as a pure function: (parameters, batch) -> scalar loss."""

OutputFn = Callable[[Params, Tensors], Tensors]
"""The model as a pure function: (parameters, x) -> output, with the samples along the first dimension."""


class Outcome(NamedTuple):
    """What the output of a model says about a target; see ``online_meta/outcomes``.

    All functions are pure and differentiable in ``output``, which is a tensor (n, ...) or a flat dict of such tensors.

    Attributes:
        nll: (output, y) -> negative log-likelihood of each row, (n,), in nats, summed over the row's own dimensions.
            Of an outcome that is no distribution, the row's loss.
        mean: output -> the expected target, (n, ...).
        cdf: (output, y) -> P(target <= y) for each entry of y, (n, ...); None if there is none.
        probabilities: output -> the probabilities of the classes, (n, classes, ...); None if there are none.
        loss: (output, y) -> the scalar loss; None for the mean of ``nll`` over the rows.
        pool: (outputs (S, n, ...), weights (S,)) -> the one output (n, ...) that says what the mixture of S outputs
            says; None to mix by ``nll``.
        variance: output -> the variance of the target, (n, ...), each entry; None if there is none.
        root: (output, y) -> R (n, ..., r), of the shape of the output and one dimension more, so that a row's R R^T is
            the curvature of its nll: the Fisher information E_y[grad nll grad nll^T] of a distribution, and the second
            derivative of another loss. A dict for an output that is one. None if it is not known.
    """

    nll: Callable[[Tensors, Tensors], Tensor]
    mean: Callable[[Tensors], Tensor]
    cdf: Callable[[Tensors, Tensors], Tensor] | None = None
    probabilities: Callable[[Tensors], Tensor] | None = None
    loss: Callable[[Tensors, Tensors], Tensor] | None = None
    pool: Callable[[Tensors, Tensor], Tensors] | None = None
    variance: Callable[[Tensors], Tensor] | None = None
    root: Callable[[Tensors, Tensors], Tensors] | None = None


class Component(NamedTuple):
    """S outputs of one family: ``outputs`` with leading dimensions (S, n) and ``log_weights`` (S,)."""

    outcome: Outcome
    outputs: Tensors
    log_weights: Tensor


Prediction = tuple[Component, ...]
"""The mixture of all outputs of all components, whose weights sum to 1; see ``online_meta/prediction.py``."""

State = Params
"""What a learner publishes: named tensors from which it answers."""


class AggregationUpdate(Protocol):
    """The state of an aggregation after a round, from that before it."""

    def __call__(self, state: Params, losses: Tensor, loss: float | None = None) -> Params:
        """Return the state after a round with the experts' ``losses`` (N,) and the aggregate's own ``loss``."""


class Aggregation(NamedTuple):
    """How much weight each of N experts has in a round; see ``online_meta/aggregation``.

    Attributes:
        init: the number N of experts -> the state before the first round, a flat dict of tensors.
        weights: state -> the weights (N,) of the next round, float64, which sum to 1.
        update: (state, losses (N,), the loss of the aggregate or None) -> the state after the round.
        bound: state -> what the theorem promises that the regret is at most, in units of the loss.
        regret: state -> the regret of the aggregate so far.
    """

    init: Callable[[int], Params]
    weights: Callable[[Params], Tensor]
    update: AggregationUpdate
    bound: Callable[[Params], float]
    regret: Callable[[Params], float]


class Belief(NamedTuple):
    """What is believed of a task after adapting: parameters (S, ...) by name, and normalised ``log_weights`` (S,)."""

    params: Params
    log_weights: Tensor


class Seen(NamedTuple):
    """What a step of the inner loop sees of the support set: the scalar ``loss``, and its gradient by name.

    ``grads`` is empty for a rule that sees the loss alone. ``size`` is the number n of samples, or the sum of their
    weights: the log-likelihood of the set is -n times the loss.
    """

    loss: Tensor
    grads: Params
    size: Tensor | float = 1.0


Schedule = Callable[[int], float]
"""Round, from 0 -> the factor of the outer loop's learning rate in that round, in [0, 1]."""

AccuracyFn = Callable[[Params, Batch], Tensor]
"""(parameters, batch) -> the share of the batch that is classified correctly, a scalar in [0, 1]."""

MetaGradient = Callable[[Meta, Task], MetaGrad]
"""(meta, task) -> an estimate of d(query loss) / d(meta) on one task, e.g. ``exact(inner)`` or ``reptile(inner)``."""


TargetKind = Literal["classes", "labels", "numbers"]
"""What a row's targets are: one of several classes, several yes-or-no labels, or numbers."""


class HeadSamples(NamedTuple):
    """A support set as the head of a model sees it: n samples, all tensors in float64.

    Attributes:
        features: the inputs of the head, (n, d); those of samples of weight 0 are zeros.
        targets: (n, k) for k outputs: one-hot classes or their probabilities, labels in [0, 1], or numbers.
        weight: how much each sample counts, (n,), at least 0; 0 is padding.
        kind: what the targets are.
    """

    features: Tensor
    targets: Tensor
    weight: Tensor
    kind: TargetKind


class LinearHead(NamedTuple):
    """The head f -> weight f + bias of a model: ``weight`` (k, d) and ``bias`` (k,), None for a head without one."""

    weight: Tensor
    bias: Tensor | None


class HeadSolver(NamedTuple):
    """How the head of a model is made of a support set in closed form; see ``online_meta/functional/features.py``.

    ``solve(rule, samples, given) -> head`` gets the rule's learned parameters, the samples and the head that the
    meta-parameters have; it returns a head of the same shapes in float64. It is twice differentiable in the rule's
    parameters and the features, works under ``vmap``, and is finite if no sample counts. ``kinds`` are the kinds of
    targets that it answers.
    """

    solve: Callable[[Params, HeadSamples, LinearHead], LinearHead]
    kinds: tuple[TargetKind, ...]


class Normal(NamedTuple):
    """A normal distribution of named tensors with independent entries: ``mean`` and ``log_std``, under equal names."""

    mean: Params
    log_std: Params


Infer = Callable[[Params, Params, Batch, Params], Normal]
"""(rule, weights that adapt, batch, gradient of the loss on the batch by name) -> what is believed of theta."""


class Inference(NamedTuple):
    """How a rule draws theta, a part of phi, and what training draws it from instead; see ``metagrads/variational.py``.

    Attributes:
        prior: p(theta | D) of the support set D, from which the rule itself draws; or p(theta), whatever D is.
        posterior: q(theta | E), from which training draws; its evidence E includes the query set.
        evidence: E: the "query" set alone, or "both" sets.
        sees: what both read of a set. "samples": theta is drawn by the rule's ``start``, and the gradients given are
            {}. "gradient": they are given the gradient of the loss, and step 0 of the rule draws theta.
    """

    prior: Infer
    posterior: Infer
    evidence: Literal["query", "both"]
    sees: Literal["samples", "gradient"]


class InnerRule(NamedTuple):
    """An inner update rule as four pure functions; see ``rules/sgd.py`` for the smallest one.

    ``init(weights) -> rule`` returns the rule's initial learned parameters for the weights that adapt;
    ``start(rule, phi, support) -> carry`` starts a task: phi_0, made from the weights that adapt and the support set,
    and the rule's state between steps, e.g. momentum. phi_0 may have further tensors under names of their own;
    ``update(rule, carry, seen, step) -> carry`` makes one step (``step`` counts from 0);
    ``view(rule, weights) -> weights`` returns the weights that the model is called with (a T-net transforms them; most
    rules do not).
    All must be differentiable and must not write to their arguments. If ``random`` is "keyed", all but ``init`` may
    draw by the functions of ``online_meta/functional/keyed.py``. If it is True, ``start`` and ``update`` may draw
    torch's random numbers, which are seeded with the task and the step; such a rule does not run under ``vmap``. For a
    rule that ``sees`` the "loss" alone, no gradient is computed. A rule with a ``head`` replaces the head of the model
    by what this solver makes of the support set, before ``start``. A rule with ``infer`` draws a part of phi, and can
    be trained by ``variational``. A rule with ``particles`` adapts M models at once:
    ``particles(rule, weights) -> (weights of each model)`` returns M views, the first of which is that of ``view``. A
    step then sees the sum of their losses, so that the gradient of a particle is its own; the query loss is that of
    their mixture. A rule whose steps descend L(phi) + ``strength`` / 2 ||phi - phi_0||^2 says so: of the sum over n
    samples, this is a normal prior of precision n ``strength``, which Laplace's approximation then has, too. A rule
    whose phi is a normal distribution of the weights has ``belief(rule, carry) -> (that distribution, the prior with
    which it began)``, and can be trained by ``hierarchical_variational``.
    """

    init: Callable[[Params], Params]
    start: Callable[[Params, Params, Batch], Carry]
    update: Callable[[Params, Carry, Seen, int], Carry]
    view: Callable[[Params, Params], Params]
    random: bool | Literal["keyed"] = False
    sees: Literal["gradient", "loss"] = "gradient"
    head: HeadSolver | None = None
    infer: Inference | None = None
    particles: Callable[[Params, Params], Sequence[Params]] | None = None
    strength: float | None = None
    belief: Callable[[Params, Carry], tuple[Normal, Normal]] | None = None


class StepReport(NamedTuple):
    """The report of a meta-step: the global gradient ``norm`` before clipping, and why it was ``skipped`` (or None)."""

    norm: float
    skipped: str | None


Gather = Callable[[MetaGrad, float], list[tuple[MetaGrad, float]]]
"""(this rank's weighted gradient, its weight) -> those of all ranks, in rank order. Collective."""


TensorFilter = Callable[[str], bool]
"""Name of a tensor in a state -> whether this process saves it; together, the ranks save all tensors."""


class Engine(Protocol):
    """The holder of meta-parameters and their optimizer, on one rank or many; it never differentiates."""

    @property
    def rank(self) -> int:
        """The index of this process, in 0..``world`` - 1."""

    @property
    def world(self) -> int:
        """The number of processes that share each meta-step."""

    @property
    def gather(self) -> "Gather | None":
        """How to gather the ranks' gradients one task at a time; None if each rank sums its own tasks first.

        With a ``gather``, every rank sums all gathered gradients in the same order and passes the total to ``apply``.
        """

    lr_scale: float
    """The factor of the learning rate in the next steps, set from a schedule; initially 1."""

    def meta(self) -> Meta:
        """Return the current meta-parameters: full, detached fp32 copies or views; do not write to them."""

    def apply(self, sums: MetaGrad, weight: float) -> StepReport:
        """Make a meta-step with the gradient (sum of ``sums`` over ranks) / (sum of ``weight`` over ranks)."""

    def save(self, keep: TensorFilter | None = None) -> Params:
        """Return detached copies of meta-parameters and optimizer state by name; only names that ``keep`` accepts."""

    def load(self, saved: Params) -> None:
        """Restore exactly the state that ``save`` returned."""


class PrefixScore(NamedTuple):
    """The query loss, in nats or squared units of y, after adapting to only the first ``points`` support samples."""

    points: int
    loss: float
    accuracy: float | None


class Calibration(NamedTuple):
    """Additive counts of the targets of some rounds: of ``pit``, or of the three others.

    Attributes:
        pit: the number of targets in each of the 20 equal bins of F(y); empty for classes.
        samples: the number of classified entries in each of the 15 equal bins of the confidence.
        correct: those of them that were classified correctly.
        confidence: the sum of their confidences, each rounded to a multiple of 2^-20.
    """

    pit: tuple[int, ...] = ()
    samples: tuple[int, ...] = ()
    correct: tuple[int, ...] = ()
    confidence: tuple[float, ...] = ()


class Score(NamedTuple):
    """The score of a task before it was learned: query losses before and after adaptation, in nats or y^2.

    ``accuracy`` is that after adaptation, in [0, 1], or None. ``prefixes`` are the scores of the requested prefixes
    that are shorter than the support set. ``nll`` is the mean negative log-likelihood of the query rows in nats, and
    ``calibration`` counts how it was spread; both are None for an outcome that is no distribution. ``sharpness`` is the
    mean standard deviation of the predictions, in units of y; None for classes, and without a distribution.
    """

    loss_before: float
    loss_after: float
    accuracy: float | None
    prefixes: tuple[PrefixScore, ...] = ()
    nll: float | None = None
    calibration: Calibration | None = None
    sharpness: float | None = None


class Learned(NamedTuple):
    """The result of learning: the past rounds that were revisited, and the reports of the meta-steps."""

    replayed: tuple[int, ...]
    steps: tuple[StepReport, ...]


class Learner(Protocol):
    """An online learner: each task is first scored with ``score``, then learned with ``learn``.

    What is scored is what is served: a score is the loss of ``answers`` from ``state`` to the task.
    """

    def state(self) -> State:
        """Return what the learner publishes: all that it answers from, as detached tensors by name. Collective."""

    def answers(self, state: State, support: Batch, x: Tensors) -> dict[str, Prediction]:
        """Return predictions for ``x`` from a published ``state`` and a support set; a pure function.

        The learner's own answer has the key ""; further ones, such as "@10" after 10 inner steps, play next to it.
        Without support samples this is the prediction before adaptation. Random draws depend on the run's seed and the
        support set alone.
        """

    def scores(self, task: Task, prefixes: Sequence[int] = ()) -> dict[str, Score]:
        """Score each of ``answers`` to the next round's task; this does not change the learner.

        For each of ``prefixes``, also score the answer to that number of first support samples.
        """

    lr_scale: float
    """The factor of the learning rate in the next meta-steps, in addition to a schedule; initially 1.

    A run sets it after a rollback. A learner without an engine ignores it.
    """

    @property
    def engine(self) -> Engine | None:
        """The holder of its meta-parameters, of several the first one; None if it learns none."""

    def score(self, task: Task, prefixes: Sequence[int] = ()) -> Score:
        """Return the score of the learner's own answer, ``scores(task, prefixes)[""]``."""

    def learn(self, *tasks: Task) -> Learned:
        """Learn all tasks scored since the last call, in the order in which they were scored."""

    def learn_more(self, update: int) -> tuple[StepReport, ...]:
        """Make an additional update on past rounds, number ``update`` (from 0) since the last round.

        Learners that do not revisit rounds do nothing.
        """

    def save(self, keep: TensorFilter | None = None) -> Params:
        """Return detached copies of all state by name; only names that ``keep`` accepts."""

    def load(self, saved: Params, rounds: int) -> None:
        """Restore the state that ``save`` returned after ``rounds`` learned rounds."""


class ReplayBuffer(Protocol):
    """A store of the tasks of all rounds so far, by round number."""

    def __getitem__(self, round: int, /) -> Task:
        """Return the task of a round."""

    def gather(self, rounds: Sequence[int]) -> Sequence[Task]:
        """Return the tasks of rounds, in their order."""

    def available(self, count: int) -> Sequence[int]:
        """Return the rounds in 0..``count`` - 1 that a learner of ``count`` rounds may revisit, in ascending order."""

    def distribute(self, shares: Sequence[Sequence[int]]) -> None:
        """Make the rounds ``shares[rank]`` readable on each rank until the next call. Collective."""

    def prefetch(self, reader: Hashable, rounds: Iterable[int]) -> None:
        """Announce that ``reader`` will probably read these rounds next, so that they can be loaded in advance."""

    def add(self, round: int, task: Task) -> None:
        """Add the task of a round that is being learned (a durable history already has it)."""
