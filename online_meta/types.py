"""The types that every floor speaks: tensors in named tuples, behaviour as plain callables."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

Params = dict[str, Tensor]
"""Parameters under flat dotted names, as ``dict(module.named_parameters())`` gives them."""


class Batch(NamedTuple):
    """Samples: ``x`` of shape (n, ...) and ``y`` of shape (n, ...), the same n."""

    x: Tensor
    y: Tensor


class Task(NamedTuple):
    """A few-shot task: adapt on ``support``, be judged on ``query``. Tensors only, so vmap works."""

    support: Batch
    query: Batch


class Meta(NamedTuple):
    """What the outer loop learns: the model's ``weights`` and the inner ``rule``'s own parameters."""

    weights: Params
    rule: Params


class MetaGrad(NamedTuple):
    """The query ``loss`` (a scalar) and its gradient; an optimizer always subtracts ``grads``."""

    loss: Tensor
    grads: Meta


class Carry(NamedTuple):
    """What the inner loop carries: the fast weights ``phi`` and the inner rule's ``state``."""

    phi: Params
    state: Params


LossFn = Callable[[Params, Batch], Tensor]
"""The model as a pure function: (parameters, batch) -> scalar loss."""

OutputFn = Callable[[Params, Tensor], Tensor]
"""The model's prediction: (parameters, x) -> output."""

Schedule = Callable[[int], float]
"""Round, from 0 -> the share of the outer loop's learning rate that its meta-steps go by, above 0."""

AccuracyFn = Callable[[Params, Batch], Tensor]
"""The share of a batch that is classified right, a scalar in 0..1."""

MetaGradient = Callable[[Meta, Task], MetaGrad]
"""An estimator of d(query loss)/d(meta) on one task: ``exact(inner)``, ``reptile(inner)``, ..."""


class InnerRule(NamedTuple):
    """An inner update rule as four pure functions; see ``rules/sgd.py`` for the smallest one.

    ``init(weights) -> rule`` makes the rule's learned parameters for the weights that adapt;
    ``start(rule, phi) -> carry`` begins a task: phi_0, made of the weights that adapt, and what the rule remembers
    between steps (momentum, say);
    ``update(rule, carry, grads, step) -> carry`` makes one step (``step`` counts from 0);
    ``view(rule, weights) -> weights`` is what the model sees (a T-net transforms them; most do not).
    All must be differentiable and must not write to their arguments. ``start`` and ``update`` of a rule that is
    ``random`` may draw torch's random numbers: they are seeded by the task and the step.
    """

    init: Callable[[Params], Params]
    start: Callable[[Params, Params], Carry]
    update: Callable[[Params, Carry, Params, int], Carry]
    view: Callable[[Params, Params], Params]
    random: bool = False


class StepReport(NamedTuple):
    """What one meta-step did: the global gradient ``norm`` before clipping; why it was ``skipped``."""

    norm: float
    skipped: str | None


Gather = Callable[[MetaGrad, float], list[tuple[MetaGrad, float]]]
"""(this rank's weighted gradient, its weight) -> those of all ranks, in the order of ranks; all have to call it."""


TensorFilter = Callable[[str], bool]
"""Which of the tensors of a state, by name, this process is to keep; all ranks together keep each of them."""


class Engine(Protocol):
    """Holds the meta-parameters and their optimizer, on one rank or many; never differentiates."""

    @property
    def rank(self) -> int:
        """This process among ``world``, from 0."""

    @property
    def world(self) -> int:
        """How many processes share each meta-step."""

    @property
    def gather(self) -> "Gather | None":
        """How the ranks' sums come together one task at a time; None where each rank first sums its own tasks.

        ``apply`` then takes what all ranks have summed, in the same order on each.
        """

    lr_scale: float
    """What the learning rate is multiplied by in the steps to come: a schedule's share of it, 1 to begin with."""

    def meta(self) -> Meta:
        """The current meta-parameters: full, detached fp32 copies or views, not to be written."""

    def apply(self, sums: MetaGrad, weight: float) -> StepReport:
        """Step on (sum of ``sums`` over ranks) / (sum of ``weight`` over ranks)."""

    def save(self, keep: TensorFilter | None = None) -> Params:
        """All state, or what ``keep`` keeps of it, as flat, detached copies: meta-parameters and optimizer state."""

    def load(self, saved: Params) -> None:
        """Take up exactly what ``save`` gave."""


class PrefixScore(NamedTuple):
    """What a task's query loses, in nats or y^2, after adaptation to the first ``points`` of its support set alone."""

    points: int
    loss: float
    accuracy: float | None


class Score(NamedTuple):
    """A task scored before it was learned: query losses before and after adaptation, in nats or y^2.

    ``prefixes`` are those of the support set that were asked for and are shorter than all of it, by their length.
    """

    loss_before: float
    loss_after: float
    accuracy: float | None
    prefixes: tuple[PrefixScore, ...] = ()


class Learned(NamedTuple):
    """What a learner did to learn: the past rounds it revisited, and its meta-steps' reports."""

    replayed: tuple[int, ...]
    steps: tuple[StepReport, ...]


class Learner(Protocol):
    """An online learner: ``score`` never changes it, ``learn`` follows the score of the same rounds."""

    def score(self, task: Task, prefixes: Sequence[int] = ()) -> Score:
        """Adapt to the next round's task and be judged on its query set; learns nothing.

        Judged, too, is adapting to the first so many points of its support set, for each of ``prefixes``.
        """

    def learn(self, *tasks: Task) -> Learned:
        """Learn the tasks scored since the last call, in the order in which they were scored."""

    def learn_more(self, update: int) -> tuple[StepReport, ...]:
        """Make one more update on past rounds, the ``update``-th since the last round, from 0; nothing for some."""

    def save(self, keep: TensorFilter | None = None) -> Params:
        """All state, or what ``keep`` keeps of it, as flat, detached copies."""

    def load(self, saved: Params, rounds: int) -> None:
        """Take up what ``save`` gave after ``rounds`` learned rounds."""


class ReplayBuffer(Protocol):
    """The tasks of the rounds so far, by round number."""

    def __getitem__(self, round: int, /) -> Task:
        """The task of that round."""

    def available(self, count: int) -> Sequence[int]:
        """Return which of the rounds 0..``count`` - 1 a learner of ``count`` rounds may revisit, in ascending order."""

    def distribute(self, shares: Sequence[Sequence[int]]) -> None:
        """Make the rounds ``shares[rank]`` readable on each rank until the next call; all ranks have to call it."""

    def prefetch(self, reader: Hashable, rounds: Iterable[int]) -> None:
        """Take note that ``reader`` will probably ask for these rounds next; they may be read meanwhile."""

    def add(self, round: int, task: Task) -> None:
        """Keep the task of a round that is being learned (a durable history already has it)."""
