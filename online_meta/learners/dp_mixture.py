"""A Dirichlet-process mixture of meta-initialisations, for streams whose tasks come in clusters."""

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, NamedTuple

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, float64, tensor

from online_meta.batching.all_reduce import distribute_samples, local_samples, sum_gradients
from online_meta.batching.task_sum import SkippingSum, TaskSum, sum_skipping_nonfinite
from online_meta.functional.model import evaluation_loss
from online_meta.learners import LearnerContext
from online_meta.meta_optimizer import flatten_meta
from online_meta.regret.scoring import ScoredTasks, score_learning_curve, score_task
from online_meta.replay import ReplaySample
from online_meta.replay._sampler import ReplaySampler
from online_meta.replay.uniform import uniform
from online_meta.schedules.constant import constant
from online_meta.types import Engine, Learned, Meta, MetaGrad, Params, Score, StepReport, Task, TensorFilter


def crp_prior(counts: Sequence[float], concentration: float) -> Tensor:
    """Return the probability that the next task is of each component, and, last, of a new one: (components + 1,).

    p(l) = n_l / (n + a) and p(new) = a / (n + a), where n_l counts the tasks of component l, n is their sum and a the
    ``concentration`` (Aldous, 1985): with n tasks one expects a log(1 + n / a) components. In float64.
    """
    weights = torch.tensor([*counts, concentration], dtype=torch.float64)
    return weights / weights.sum()


def responsibilities(prior: Tensor, losses: Sequence[float], samples: int, temperature: float) -> Tensor:
    """Return p(l | support set), proportional to prior_l exp(-samples losses_l / temperature); in float64.

    ``losses`` are means over the ``samples`` of the support set. In nats, temperature 1 is Bayes' rule; of squares, it
    is for a variance of temperature / 2. A loss that is not finite explains nothing; all are 0 where none is finite.
    """
    fits = torch.tensor([*losses], dtype=torch.float64)
    joint = prior.log() - samples * fits / temperature
    joint = torch.where(torch.isfinite(fits), joint, -torch.inf)
    return torch.nan_to_num(torch.softmax(joint, 0), nan=0.0)


SEED_OFFSET = 5
"""Sets this learner's draws apart from those of others with the same seed."""


COUNTS = "counts"
"""The name, in what is saved, of the number of tasks of each component; 0 where there is none."""


NEGLIGIBLE = 1e-3
"""Responsibilities below it count as none: gradients of so little weight are not worth their time."""


class MixtureOptions(NamedTuple):
    """How components come and go.

    Attributes:
        concentration: of the Chinese restaurant process; above 0, the larger the more components.
        temperature: what support losses, summed over the samples, are divided by; above 0, in units of the loss.
        most: components at the same time; each has an engine of its own.
        horizon: rounds after which a task counts for 1 / e of one that is new.
        fewest: a component that counts for fewer tasks is pruned.
    """

    concentration: float = 1.0
    temperature: float = 1.0
    most: int = 6
    horizon: float = 1000.0
    fewest: float = 0.1


class DirichletProcessMixture:
    """Components, each an initialisation that follows the leader of its own cluster (Jerfel et al., NeurIPS 2019).

    By stochastic expectation-maximisation: a task belongs to component l with the responsibility
    p(l | support) ~ n_l exp(-loss of U(w_l) on the support set / temperature), and to a new one, w_new being the run's
    first parameters, with the concentration in place of n_l. It is answered by the most probable of them all, which
    its query set has no part in. It founds a component when that is the new one; then each component makes a
    meta-step on the rounds that are revisited, weighted by their responsibilities under the components as they are now.
    One of the rounds is always new, so that a young component learns at once; the others are the replay policy's.
    """

    def __init__(self, context: LearnerContext, options: MixtureOptions) -> None:
        """Begin at round 0 without a component. Raises ``ValueError`` for an option out of its range."""
        _check(options)
        self._context, self._options = context, options
        self._engines = [context.engine(context.start) for _ in range(options.most)]
        self._counts = [0.0] * options.most
        self._round = 0
        self._loss = evaluation_loss(context.inner.loss)
        self.task_sum = TaskSum(context.gradient, context.programs)
        self._gradient = _skip_unassigned(sum_skipping_nonfinite(self.task_sum))
        # A policy that measures the leader's gradients finds here not one but several.
        replay = context.replay if context.replay.measure is None else uniform()
        self._sampler = ReplaySampler(replay, context.seed + SEED_OFFSET, context.batch, context.gather)
        self._schedule = constant() if context.schedule is None else context.schedule
        self._scored = ScoredTasks()

    @property
    def engine(self) -> Engine:
        """One of the engines, all of one shape."""
        return self._engines[0]

    @property
    def counts(self) -> tuple[float, ...]:
        """How many tasks each place's component has, older ones discounted; 0 where there is none."""
        return tuple(self._counts)

    def score(self, task: Task, prefixes: Sequence[int] = ()) -> Score:
        """Return the losses of the next round's task under the component that its support set chooses.

        Of each of ``prefixes`` under the one that those few points choose.
        """
        self._scored.add(task)
        return score_learning_curve(self._judge, task, prefixes)

    def _judge(self, task: Task) -> Score:
        metas = [*self._metas(), self._context.start]
        chosen = int(self._responsibilities(task, metas).argmax())
        return score_task(self._context.inner, metas[chosen], task, self._context.accuracy)

    def learn(self, *tasks: Task) -> Learned:
        """Assign the tasks scored since the last call, then make this update's meta-steps with each component."""
        self._scored.take(tasks)
        context, first = self._context, self._round
        for engine in self._engines:
            engine.lr_scale = self._schedule(first)
        for task in tasks:
            context.buffer.add(self._round, task)
            self._assign(task)
            self._round += 1
        self._sampler.begin_round(self._round - 1, context.buffer.available(self._round))
        context.buffer.prefetch(self, self._predicted_rounds())
        replayed: list[int] = []
        reports: list[StepReport] = []
        for step in range(context.steps_per_round if self._components() else 0):
            samples = _include_round(self._sampler.draw_samples(step), first + step % len(tasks))
            reports += self._step(samples)
            replayed += [sample.round for sample in samples]
        return Learned(tuple(replayed), tuple(reports))

    def learn_more(self, update: int) -> tuple[StepReport, ...]:
        """Make ``steps_per_round`` more meta-steps with each component, the ``update``-th time since the last round."""
        self._scored.check_none()
        if not self._components():
            return ()
        for engine in self._engines:
            engine.lr_scale = self._schedule(self._round - 1)
        self._sampler.resume_round(self._round - 1, self._context.buffer.available(self._round))
        steps = self._context.steps_per_round
        first = (update + 1) * steps
        return tuple(
            report for step in range(first, first + steps) for report in self._step(self._sampler.draw_samples(step))
        )

    def _components(self) -> list[int]:
        return [component for component, count in enumerate(self._counts) if count]

    def _metas(self) -> list[Meta]:
        return [self._engines[component].meta() for component in self._components()]

    def _responsibilities(self, task: Task, metas: Sequence[Meta]) -> Tensor:
        """Return the responsibilities of the components, and of a new one if ``metas`` has one more for it."""
        prior = crp_prior([self._counts[component] for component in self._components()], self._options.concentration)
        losses = [float(self._loss(self._context.inner.adapt(meta, task.support), task.support)) for meta in metas]
        return responsibilities(prior[: len(metas)], losses, len(task.support.y), self._options.temperature)

    def _assign(self, task: Task) -> None:
        """Count a new task to the components, or let it found one; prune those that are hardly used any more."""
        components, options = self._components(), self._options
        has_room = len(components) < options.most
        shares = self._responsibilities(task, [*self._metas(), *([self._context.start] if has_room else [])])
        # Ranks on unlike machines may differ in the last bit; they must not differ in what they do.
        own: list[float] = self._context.gather(shares.tolist())[0]
        counts = [count * (1 - 1 / options.horizon) for count in self._counts]
        if has_room and own[-1] > 0 and own[-1] == max(own):
            component = self._counts.index(0.0)
            self._engines[component].load(flatten_meta(self._context.start))
            counts[component] = 1.0
        else:
            total = sum(own[: len(components)]) or 1.0
            for component, share in zip(components, own, strict=False):
                counts[component] += share / total
        self._counts = [count if count >= options.fewest else 0.0 for count in counts]

    def _step(self, samples: Sequence[ReplaySample]) -> list[StepReport]:
        """Find the picks' responsibilities, then step each component that has any."""
        buffer, gather = self._context.buffer, self._context.gather
        distribute_samples(self.engine, buffer, samples)
        metas = self._metas()
        own = [
            self._responsibilities(buffer[sample.round], metas).tolist()
            for sample in local_samples(self.engine, samples)
        ]
        by_rank: list[list[list[float]]] = gather(own)
        shares = [by_rank[at % self.engine.world][at // self.engine.world] for at in range(len(samples))]
        reports = []
        for at, component in enumerate(self._components()):
            responsibility = [share[at] if share[at] >= NEGLIGIBLE else 0.0 for share in shares]
            if any(responsibility):
                weighted = [
                    ReplaySample(p.round, p.weight * b, p.share * b)
                    for p, b in zip(samples, responsibility, strict=True)
                ]
                engine = self._engines[component]
                reports.append(engine.apply(*sum_gradients(engine, self._gradient, buffer, weighted)))
        return reports

    def _predicted_rounds(self) -> Iterator[int]:
        """Tell what this rank will probably revisit, of the rounds that are there."""
        for samples in self._sampler.predict_samples(self._context.steps_per_round):
            yield from (sample.round for sample in local_samples(self.engine, samples) if sample.round < self._round)

    def save(self, keep: TensorFilter | None = None) -> Params:
        """Return the state of the components' engines, their counts, and the memory of the replay."""
        saved = self._sampler.save(keep)
        if keep is None or keep(COUNTS):
            saved[COUNTS] = tensor(self._counts, dtype=float64)
        for component in self._components():
            mine = _component_filter(component, keep)
            saved |= {f"{component}.{name}": value for name, value in self._engines[component].save(mine).items()}
        return saved

    def load(self, saved: Params, rounds: int) -> None:
        """Take up what ``save`` gave after ``rounds`` learned rounds."""
        rest = self._sampler.load(saved)
        self._counts = rest[COUNTS].tolist()
        for component in self._components():
            start = f"{component}."
            self._engines[component].load({n.removeprefix(start): v for n, v in rest.items() if n.startswith(start)})
        self._round, self._scored = rounds, ScoredTasks()


def _check(options: MixtureOptions) -> None:
    if not (options.concentration > 0 and options.temperature > 0 and options.most >= 1):
        raise ValueError(
            f"concentration is {options.concentration}, temperature {options.temperature}, most {options.most}: the "
            "first two are above 0, the last is 1 or more"
        )
    if not (options.horizon > 1 and 0 <= options.fewest < 1):
        raise ValueError(
            f"horizon is {options.horizon} and fewest {options.fewest}: the first is above 1, the other below 1, for a "
            "component begins with one task, and not negative"
        )


def _include_round(samples: list[ReplaySample], new: int) -> list[ReplaySample]:
    """Return the picks with the round ``new`` among them, in place of the last where it is not."""
    return samples if any(sample.round == new for sample in samples) else [*samples[:-1], ReplaySample(new)]


def _skip_unassigned(sum_tasks: SkippingSum) -> SkippingSum:
    """Return the sum over the tasks that have a share in it."""

    def sum_members(meta: Meta, tasks: Sequence[Task], samples: Sequence[ReplaySample]) -> tuple[MetaGrad, float]:
        members = [(task, sample) for task, sample in zip(tasks, samples, strict=True) if sample.share]
        return sum_tasks(meta, [task for task, _ in members], [sample for _, sample in members])

    return sum_members


def _component_filter(component: int, keep: TensorFilter | None) -> Callable[[str], bool] | None:
    return None if keep is None else lambda name: keep(f"{component}.{name}")


def build(
    context: LearnerContext,
    concentration: Annotated[float, Gt(0)] = 1.0,
    temperature: Annotated[float, Gt(0)] = 1.0,
    most: Annotated[int, Ge(1)] = 6,
    horizon: Annotated[float, Gt(1)] = 1000.0,
    fewest: Annotated[float, Ge(0), Lt(1)] = 0.1,
) -> DirichletProcessMixture:
    """Return the baseline; ``MixtureOptions`` says what its options are."""
    return DirichletProcessMixture(context, MixtureOptions(concentration, temperature, most, horizon, fewest))
