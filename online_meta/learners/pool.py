"""The pool: a mixture of the answers of other learners, weighted by the losses that they had before they learned."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Annotated, Any, Literal, NamedTuple

import torch
from annotated_types import Gt
from torch import Tensor
from torch.utils._pytree import tree_leaves

import online_meta.aggregation
import online_meta.learners
from online_meta import registry
from online_meta.aggregation import numbers
from online_meta.aggregation._clipping import USUAL, Clipping, clip_running, clip_to_range
from online_meta.answers import ALONE, Answers
from online_meta.batches import empty_like, select_samples
from online_meta.functional.keyed import keyed, uniform_like
from online_meta.functional.model import ModelLoss
from online_meta.functional.randomness import INIT_STEP
from online_meta.functional.recording import Recorder
from online_meta.learners import LR, OPTIMIZER, LearnerContext, gather_single_process, use_own_optimizer
from online_meta.learners._online_step import copy_state
from online_meta.prediction import mix, pool
from online_meta.regret.ledger import LOSS_CAP, charge_for, is_finite_loss
from online_meta.regret.scoring import (
    OrderError,
    ScoredLearner,
    ScoredTasks,
    TaskAnswers,
    answer_as_scored,
    answer_task,
    score_answers,
)
from online_meta.types import (
    Aggregation,
    Batch,
    Learned,
    Learner,
    LossFn,
    Params,
    Prediction,
    State,
    StepReport,
    Task,
    TensorFilter,
    Tensors,
)

NAME = "pool"
"""What the pool of a run is called."""
WEIGHTS = "/weight/"
"""Prefix of the experts' weights in what the pool publishes; the state of learner NAME has the prefix "NAME/"."""
AGGREGATION, PLACE, LEAD = "aggregation", "place", "lead"
"""Prefixes of what the pool saves: the aggregation's state, the place of each expert, and its loss minus theirs."""

HUGE = 1000.0
"""How many times larger than the targets, and than a usual answer, an answer is that no mean can contain."""

Mixing = Literal["density", "mean", "draw"]
"""How answers become one: densities are averaged, outputs are averaged, or one answer is drawn."""

AUTO: dict[Mixing, str] = {"density": "bayes", "mean": "tracking", "draw": "adahedge"}
"""The aggregation by default. Learners get better as they learn, so that the best of them changes."""


class PoolFigures(NamedTuple):
    """The pool in one round.

    Attributes:
        weights: of the experts, by the names of their answers, before the round.
        regret: the pool's cumulative loss minus that of the best expert after the round, both as the aggregation counts
            them; of clipped losses, if they are clipped.
        bound: what ``regret`` is at most, whatever the losses.
        unclipped_regret: the same difference of the losses as they are.
    """

    weights: dict[str, float]
    regret: float
    bound: float
    unclipped_regret: float


def find_mixing(loss: LossFn) -> Mixing:
    """Return how answers of a model with this loss become one.

    "density" where an output is a distribution, whose densities are averaged; "mean" where an outcome averages its
    outputs, such as mse, whose loss is convex in them; "draw" for every other loss.
    """
    if not isinstance(loss, ModelLoss):
        return "draw"
    outcome = loss.outcome
    if outcome.probabilities is not None or outcome.cdf is not None:
        return "density"
    return "draw" if outcome.pool is None else "mean"


def choose_aggregation(
    mixing: Mixing, name: str = "auto", options: Mapping[str, Any] | None = None, clipping: Clipping = USUAL
) -> Aggregation:
    """Return the aggregation of a pool.

    Args:
        mixing: how answers become one.
        name: of the registry; "auto" is "bayes" for densities, "tracking" for averaged outputs, whose loss is known,
            and "adahedge" otherwise.
        options: of the aggregation.
        clipping: where losses are clipped that have no known range; losses of densities never are.

    Raises:
        ValueError: for an unknown name or option, or an aggregation whose theorem does not hold for this mixing.
    """
    options = dict(options or {})
    name = AUTO[mixing] if name == "auto" else name
    if mixing != "density" and name in ("bayes", "fixed_share"):
        raise ValueError(
            f"{name} weights densities, and this loss is no density: choose adahedge, tracking, squint with the range "
            "of the losses, or, for mse, exp_concave with the range of the targets"
        )
    if mixing != "mean" and name == "exp_concave":
        raise ValueError("exp_concave is for the squared loss: choose bayes for densities, or adahedge")
    build = registry.load(online_meta.aggregation, name)
    try:
        made: Aggregation = build(**options)
    except TypeError as error:
        raise ValueError(f"options {options} do not fit the aggregation {name!r}: {error}") from error
    if name in ("adahedge", "tracking") and mixing != "density":
        return clip_running(made, clipping)
    if name == "squint":
        return clip_to_range(made, options.get("low", 0.0), options.get("high", 1.0))
    return clip_to_range(made, 0.0, (options["high"] - options["low"]) ** 2) if name == "exp_concave" else made


class Pool(ScoredLearner):
    """The mixture of the answers of other learners, the experts, which learn by themselves.

    In round t it answers with the mixture of the experts' answers under the weights w_t, which an aggregation makes
    from the losses of earlier rounds. So its cumulative loss is at most that of the best expert plus the bound of the
    aggregation: log N for densities (Vovk, "Aggregating strategies", COLT 1990); see ``online_meta/aggregation``. The
    outcome's densities are averaged, or else its outputs; where neither is possible, an answer is drawn by key with
    the probabilities w_t, and the bound holds for the expected loss.

    Every answer of every learner is an expert, by its name: "ftml", "ftml@10". Those that are not there, or not
    finite, are left out of the mixture, and the other weights are scaled up; they are charged like a loss that is not
    finite, or, where they do not answer at all, the weighted mean of the others. Rounds of one shared update have the
    weights from before it. The weights are a function of the losses in the ledger, to the bit.
    """

    engine = None
    lr_scale = 1.0

    def __init__(
        self,
        experts: Mapping[str, Learner],
        aggregation: Aggregation,
        mixing: Mixing,
        *,
        seed: int = 0,
        gather: Callable[[Any], list[Any]] = gather_single_process,
    ) -> None:
        """Start at round 0 with equal weights.

        Args:
            experts: the learners by name.
            aggregation: makes the weights.
            mixing: how answers become one.
            seed: of the draws.
            gather: returns on every rank the list of all ranks' values; the losses of the first rank count.

        Raises:
            ValueError: without experts.
        """
        if not experts:
            raise ValueError("a pool needs at least one expert")
        super().__init__()
        self.experts = dict(experts)
        self.order_matters = mixing == "draw" or any(getattr(one, "order_matters", False) for one in experts.values())
        self._aggregation, self._mixing, self._seed, self._gather = aggregation, mixing, seed, gather
        found = {name: getattr(one, "prepare", None) for name, one in experts.items()}
        self._prepared = {name: prepare for name, prepare in found.items() if prepare is not None}
        self.prepare = self._prepare_experts if self._prepared else None
        self._mixer = Mixer(Recorder(_find_sizes), Recorder(_mix_all))
        self._forget()

    def _prepare_experts(self, state: State) -> None:
        """Do the work that answers from ``state`` share."""
        for name, prepare in self._prepared.items():
            prepare(select_state(state, name))

    def _forget(self) -> None:
        self._names: list[str] = []
        self._state: Params = {}
        self._lead: list[float] = []
        self._observed: list[tuple[dict[str, float], float]] = []
        self.figures: tuple[PoolFigures, ...] = ()

    def weights(self) -> dict[str, float]:
        """Return the weight of each expert in the next round; empty before the first round, when all are equal."""
        found = self._aggregation.weights(self._state).tolist() if self._names else []
        return dict(zip(self._names, found, strict=True))

    def state(self) -> State:
        """Return what each expert publishes, and the weights."""
        found = {f"{name}/{key}": value for name, one in self.experts.items() for key, value in one.state().items()}
        return found | {WEIGHTS + name: numbers(weight) for name, weight in self.weights().items()}

    def answers(self, state: State, support: Batch, x: Tensors) -> dict[str, Prediction]:
        """Return the mixture of the experts' answers, from what they and the pool have published; a pure function."""
        return self.mix_answers_of({name: one.answers for name, one in self.experts.items()}, state, support, x)

    def mix_answers_of(
        self, experts: Mapping[str, Answers], state: State, support: Batch, x: Tensors
    ) -> dict[str, Prediction]:
        """Return what ``answers`` returns, where these functions answer as the experts do."""
        weights = {key.removeprefix(WEIGHTS): float(value) for key, value in state.items() if key.startswith(WEIGHTS)}
        each = {name: answers(select_state(state, name), support, x) for name, answers in experts.items()}
        return {"": self._mix(weights, support, each, MIXER)}

    def answer_task(self, task: Task, prefixes: Sequence[int] = ()) -> TaskAnswers:
        """Return the answers to the next round's task, which are to be scored; this does not change the learner."""
        each = {name: answer_task(one.answers, one.state(), task, prefixes) for name, one in self.experts.items()}
        return self.mix_answers(task, each)

    def mix_answers(self, task: Task, answered: Mapping[str, TaskAnswers]) -> TaskAnswers:
        """Return the pool's answers to the next round's task, from those of its experts by the names of learners."""
        self._scored.add(task)
        weights, support = self.weights(), task.support
        mine = {name: answered[name] for name in self.experts if name in answered}
        points = [points for points, _ in next(iter(mine.values())).parts]

        def mix_at(support: Batch, each: dict[str, dict[str, Prediction]]) -> dict[str, Prediction]:
            return {"": self._mix(weights, support, each, self._mixer)}

        with torch.no_grad():
            parts = tuple(
                (
                    count,
                    mix_at(
                        select_samples(support, slice(count)), {name: one.parts[at][1] for name, one in mine.items()}
                    ),
                )
                for at, count in enumerate(points)
            )
            return TaskAnswers(
                mix_at(empty_like(support), {name: one.before for name, one in mine.items()}),
                mix_at(support, {name: one.whole for name, one in mine.items()}),
                parts,
            )

    def observe(self, losses: Mapping[str, float], loss: float) -> None:
        """Note the losses of a task that was scored, for the next call of ``learn``.

        Args:
            losses: by the names of answers; one that is not finite is already charged. Those of other learners than the
                experts do not count.
            loss: the pool's own.
        """
        own = {name: one for name, one in losses.items() if name.partition("@")[0] in self.experts}
        self._observed.append((own, loss))

    def learn(self, *tasks: Task) -> Learned:
        """Change the weights by the losses of the tasks that were scored since the last call, one by one.

        Raises:
            OrderError: for a task that was not scored, or whose losses were not noted.
        """
        self._scored.take(tasks)
        observed: list[Any] = self._gather(self._observed)[0]
        self._observed = []
        if len(observed) != len(tasks):
            raise OrderError(f"the losses of {len(observed)} of {len(tasks)} scored tasks are known: call observe()")
        weights = self.weights()
        self.figures = tuple(self._learn(losses, loss, weights) for losses, loss in observed)
        return Learned((), ())

    def _learn(self, losses: dict[str, float], loss: float, weights: dict[str, float]) -> PoolFigures:
        if not self._names:
            self._names, self._lead = [*losses], [0.0] * len(losses)
            self._state = self._aggregation.init(len(losses))
        awake = [name for name in self._names if name in losses]
        shares = dict(zip(awake, _shares(weights, awake), strict=True))
        usual = math.fsum(share * losses[name] for name, share in shares.items()) / math.fsum(shares.values())
        charged = [losses.get(name, usual) for name in self._names]
        own = None if self._mixing == "draw" else loss
        self._state = self._aggregation.update(self._state, numbers(charged), own)
        self._lead = [lead + (loss - one) for lead, one in zip(self._lead, charged, strict=True)]
        total = 1.0 if weights and len(awake) == len(self._names) else math.fsum(shares.values())
        return PoolFigures(
            {name: shares.get(name, 0.0) / total for name in self._names},
            self._aggregation.regret(self._state),
            self._aggregation.bound(self._state),
            max(self._lead),
        )

    def learn_more(self, update: int) -> tuple[StepReport, ...]:
        """Do nothing: the pool does not revisit past tasks."""
        return ()

    def save(self, keep: TensorFilter | None = None) -> Params:
        """Return the names of the experts, the state of the aggregation, and how far the pool is behind each expert."""
        places = {name: torch.tensor(at) for at, name in enumerate(self._names)}
        leads = {name: numbers(lead) for name, lead in zip(self._names, self._lead, strict=True)}
        return copy_state({PLACE: places, LEAD: leads, AGGREGATION: self._state}, keep)

    def load(self, saved: Params, rounds: int) -> None:
        """Restore the state that ``save`` returned after ``rounds`` learned rounds."""
        self._forget()
        self._scored = ScoredTasks()
        places = _select(saved, f"{PLACE}.")
        self._names = sorted(places, key=lambda name: int(places[name]))
        self._lead = [float(value) for value in map(_select(saved, f"{LEAD}.").__getitem__, self._names)]
        self._state = _select(saved, f"{AGGREGATION}.")

    def _mix(
        self,
        weights: Mapping[str, float],
        support: Batch,
        each: Mapping[str, Mapping[str, Prediction]],
        mixer: "Mixer",
    ) -> Prediction:
        """Return the mixture of predictions by learner and suffix; those that are not finite do not count."""
        named = {name + suffix: one for name, found in each.items() for suffix, one in found.items()}
        if weights:
            named = {name: one for name, one in named.items() if name in weights}
        if self._mixing == "mean":
            sizes = mixer.find_sizes(tuple(named.values()), support.y).tolist()
            named = _leave_out_huge(named, sizes[:-1], sizes[-1])
        mixed = self._mix_named(weights, support, named, mixer)
        finite = {name: one for name, one in named.items() if _is_finite(one)} if not _is_finite(mixed) else {}
        return self._mix_named(weights, support, finite, mixer) if finite else mixed

    def _mix_named(
        self, weights: Mapping[str, float], support: Batch, named: Mapping[str, Prediction], mixer: "Mixer"
    ) -> Prediction:
        shares = _shares(weights, [*named])
        if self._mixing == "draw":
            return [*named.values()][_draw(shares, support, self._seed)]
        return mixer.mix(
            tuple(named.values()), numbers([math.log(share) if share > 0 else -math.inf for share in shares])
        )


def _shares(weights: Mapping[str, float], names: Sequence[str]) -> list[float]:
    """Return the weights of those that answer, which are equal if they are all too small for a number."""
    found = [weights.get(name, 1.0) for name in names]
    return found if any(found) else [1.0] * len(names)


def _draw(shares: Sequence[float], support: Batch, seed: int) -> int:
    """Draw a place with probabilities proportional to ``shares``, as a function of the support set and the seed."""
    with keyed(support, INIT_STEP, "answer", seed):
        point = float(uniform_like(torch.zeros((), dtype=torch.float64))) * math.fsum(shares)
    sums = [math.fsum(shares[: at + 1]) for at in range(len(shares))]
    return next((at for at, total in enumerate(sums) if point < total), len(shares) - 1)


def _leave_out_huge(named: dict[str, Prediction], sizes: Sequence[float], usual: float) -> dict[str, Prediction]:
    """Return the answers that are not ``HUGE`` times as large as both the support's targets and the median answer.

    The mean of many answers with one of a model that diverged would be as wrong as that one.
    """
    most = HUGE * max(median(sizes), usual)
    return {name: one for (name, one), size in zip(named.items(), sizes, strict=True) if size <= most} or named


def _find_sizes(predictions: tuple[Prediction, ...], y: Tensors) -> Tensor:
    """Return the sizes of predictions, and then that of the targets ``y``; infinity for those that are not finite."""
    found = torch.stack([*(_find_size([part.outputs for part in one]) for one in predictions), _find_size(y)])
    return torch.where(found.isfinite(), found, math.inf)


def _find_size(tensors: Any) -> Tensor:
    """Return the root of the mean square of all numbers, on the CPU; 0.0 without any."""
    values = torch.cat([one.detach().double().flatten() for one in tree_leaves(tensors)])
    return (values.square().mean().sqrt() if len(values) else values.new_zeros(())).cpu()


def _mix_all(predictions: tuple[Prediction, ...], log_weights: Tensor) -> Prediction:
    return pool(mix(predictions, log_weights))


class Mixer(NamedTuple):
    """The functions of tensors of which a mixture consists: ``_find_sizes`` and ``_mix_all``, which may be recorded."""

    find_sizes: Callable[[tuple[Prediction, ...], Tensors], Tensor]
    mix: Callable[[tuple[Prediction, ...], Tensor], Prediction]


MIXER = Mixer(_find_sizes, _mix_all)


def _is_finite(prediction: Prediction) -> bool:
    return all(bool(one.isfinite().all()) for part in prediction for one in tree_leaves(part.outputs))


def _select(named: Mapping[str, Tensor], prefix: str) -> Params:
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}


def swap_experts(saved: Params, one: str, other: str) -> Params:
    """Return what a pool has saved with the places of two learners exchanged, for all answers that both give."""
    names = {*_select(saved, f"{PLACE}.")}
    both = [suffix for suffix in (name.removeprefix(one) for name in names) if {one + suffix, other + suffix} <= names]
    moved = {a + suffix: b + suffix for suffix in both for a, b in ((one, other), (other, one))}
    found = dict(saved)
    for prefix in (PLACE, LEAD):
        found |= {f"{prefix}.{new}": saved[f"{prefix}.{old}"] for old, new in moved.items()}
    return found


def select_state(state: State, learner: str) -> State:
    """Return what one learner has published, from what a pool has."""
    return _select(state, f"{learner}/")


class OwningPool(Pool):
    """A pool that plays alone: its experts are scored, learn and are saved with it."""

    def answer_task(self, task: Task, prefixes: Sequence[int] = ()) -> TaskAnswers:
        """Return the mixture of the experts' answers to the next round's task, and note everyone's losses."""
        again = task is self._scored.last()
        answered = {name: answer_as_scored(one, task, prefixes) for name, one in self.experts.items()}
        mixed = self.mix_answers(task, answered)
        scores = {
            name + suffix: score
            for name, found in {**answered, NAME: mixed}.items()
            for suffix, score in score_answers(found, task).items()
        }
        losses = {name: score.loss_after for name, score in scores.items()}
        charge = charge_for(losses.values(), LOSS_CAP)
        charged = {name: loss if is_finite_loss(loss) else charge for name, loss in losses.items()}
        if not again:
            self.observe(charged, charged[NAME])
        return mixed

    def learn(self, *tasks: Task) -> Learned:
        """Change the weights, then let each expert learn the tasks that were scored since the last call."""
        learned = super().learn(*tasks)
        steps = [one.learn(*tasks) for one in self.experts.values()]
        return learned._replace(steps=tuple(report for one in steps for report in one.steps))

    def learn_more(self, update: int) -> tuple[StepReport, ...]:
        """Let each expert make an additional update on past rounds."""
        return tuple(report for one in self.experts.values() for report in one.learn_more(update))

    def save(self, keep: TensorFilter | None = None) -> Params:
        """Return the state of the pool and of its experts."""
        own = super().save(keep)
        for name, one in self.experts.items():
            found = one.save(None if keep is None else partial(_keep, keep, f"{name}/"))
            own |= {f"{name}/{key}": value for key, value in found.items()}
        return own

    def load(self, saved: Params, rounds: int) -> None:
        """Restore the state that ``save`` returned after ``rounds`` learned rounds."""
        super().load(saved, rounds)
        for name, one in self.experts.items():
            one.load(_select(saved, f"{name}/"), rounds)


def _keep(keep: TensorFilter, prefix: str, name: str) -> bool:
    return keep(prefix + name)


def build(
    context: LearnerContext,
    experts: tuple[str, ...] = ("ftml", "from_scratch"),
    aggregation: str = "auto",
    options: dict[str, Any] | None = None,
    optimizer: str = OPTIMIZER,
    lr: Annotated[float, Gt(0)] = LR,
) -> OwningPool:
    """Create a pool that plays alone. The pool of a run is made of the run's own learners: see ``Pool``.

    Args:
        context: what all learners share.
        experts: the learners to mix, with their default options.
        aggregation: how they are weighted, see ``choose_aggregation``.
        options: options of the aggregation.
        optimizer: the optimizer of the experts' meta-parameters, as in [meta].
        lr: its learning rate, above 0, constant over the rounds.

    Raises:
        ValueError: if an expert or the aggregation cannot be made.
    """
    inner = replace(context.inner, **ALONE)  # One expert a learner.
    own = use_own_optimizer(replace(context, inner=inner), optimizer, lr)
    made = {name: registry.load(online_meta.learners, name)(own) for name in experts}
    mixing = find_mixing(context.inner.loss)
    chosen = choose_aggregation(mixing, aggregation, options)
    return OwningPool(made, chosen, mixing, seed=context.seed, gather=context.gather)
