"""A Dirichlet-process mixture of meta-initialisations, for streams whose tasks come in clusters."""

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, NamedTuple

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, float64, tensor

from online_meta.answers import believe_by_inner_loop, predict
from online_meta.batches import count_samples
from online_meta.batching.all_reduce import GradientSum, distribute_samples, local_samples, sum_gradients
from online_meta.batching.failures import is_task_failure
from online_meta.batching.task_sum import SkippingSum, TaskSum, sum_skipping_nonfinite
from online_meta.learners import LR, OPTIMIZER, LearnerContext, ParameterLearner, use_own_optimizer
from online_meta.meta_optimizer import flatten_meta, unflatten_meta
from online_meta.prediction import loss_of
from online_meta.regret.scoring import ScoredTasks
from online_meta.replay import ReplaySample
from online_meta.replay._sampler import ReplaySampler
from online_meta.replay._task_draw import DrawnTasks
from online_meta.replay.uniform import uniform
from online_meta.schedules.constant import constant
from online_meta.types import (
    Batch,
    Belief,
    Engine,
    Learned,
    Meta,
    MetaGrad,
    Params,
    State,
    StepReport,
    Task,
    TensorFilter,
)


def crp_prior(counts: Sequence[float], concentration: float) -> Tensor:
    """Return the prior probability of each component and, last, of a new one: shape (components + 1,), float64.

    p(l) = n_l / (n + a) and p(new) = a / (n + a), where n_l counts the tasks of component l, n is their sum and a the
    ``concentration`` (Aldous, 1985). The expected number of components after n tasks is about a log(1 + n / a).
    """
    weights = torch.tensor([*counts, concentration], dtype=torch.float64)
    return weights / weights.sum()


def responsibilities(prior: Tensor, losses: Sequence[float], samples: float, temperature: float) -> Tensor:
    """Return p(l | support set), proportional to prior_l exp(-samples losses_l / temperature); float64.

    ``losses`` are means over the ``samples`` of the support set, which are counted by their weights. For losses in
    nats, temperature 1 is Bayes' rule; for
    squared errors, the temperature is twice the noise variance. A component whose loss is not finite gets 0.
    """
    fits = torch.tensor([*losses], dtype=torch.float64)
    joint = prior.log() - samples * fits / temperature
    joint = torch.where(torch.isfinite(fits), joint, -torch.inf)
    return torch.nan_to_num(torch.softmax(joint, 0), nan=0.0)


SEED_OFFSET = 5
"""Added to the seed, so that this learner draws differently from others with the same seed."""


COUNTS = "counts"
"""Name of the number of tasks of each component in the saved state; 0 for an unused slot."""


NEGLIGIBLE = 1e-3
"""Responsibilities below this count as 0, which saves the time to compute gradients of negligible weight."""


class MixtureOptions(NamedTuple):
    """The options of the mixture.

    Attributes:
        concentration: concentration of the Chinese restaurant process, above 0; larger values create more components.
        temperature: divides the support losses summed over the samples; above 0, in units of the loss.
        most: maximum number of components at the same time, at least 1; each has its own engine.
        horizon: number of rounds after which the weight of a task has decayed to 1 / e, above 1.
        fewest: a component with a smaller discounted number of tasks is pruned; in [0, 1).
    """

    concentration: float = 1.0
    temperature: float = 1.0
    most: int = 6
    horizon: float = 1000.0
    fewest: float = 0.1


class DirichletProcessMixture(ParameterLearner):
    """A mixture of initialisations, each following the leader of its own cluster (Jerfel et al., NeurIPS 2019).

    It uses stochastic expectation-maximisation. A task belongs to component l with the responsibility
    p(l | support) ~ n_l exp(-loss of U(w_l) on the support set / temperature), and to a new component, whose w is the
    run's initial parameters, with the concentration in place of n_l. The learner answers with the mixture of all
    components, adapted and weighted so; the query set is not used for this. If the new component is the most probable
    one, it is kept when the task is learned. Then each component makes a meta-step
    on the replayed rounds, weighted by their current responsibilities. One of these rounds is always new, so that a
    young component learns at once; the replay policy draws the others.
    """

    def __init__(self, context: LearnerContext, options: MixtureOptions) -> None:
        """Start at round 0 without components; raise ``ValueError`` if an option is out of range."""
        _check(options)
        super().__init__()
        self._context, self._options = context, options
        self.inner = context.inner
        self._engines = [context.engine(context.start) for _ in range(options.most)]
        self.lr_scale = 1.0
        self._counts = [0.0] * options.most
        self._round = 0
        masks = getattr(context.inner.loss, "masks", None)
        self.task_sum = TaskSum(context.gradient, context.programs, context.draw, masks)
        self._gradient_sum = GradientSum(_skip_unassigned(sum_skipping_nonfinite(self.task_sum)), context.failures)
        # Policies that measure the leader's gradients do not apply: there are several leaders here.
        replay = context.replay if context.replay.measure is None else uniform()
        self._sampler = ReplaySampler(replay, context.seed + SEED_OFFSET, context.batch, context.gather)
        self._schedule = constant() if context.schedule is None else context.schedule

    @property
    def engine(self) -> Engine:
        """The first engine; all engines have the same shapes."""
        return self._engines[0]

    @property
    def counts(self) -> tuple[float, ...]:
        """The discounted number of tasks of the component in each slot; 0 for an unused slot."""
        return tuple(self._counts)

    def state(self) -> State:
        """Return the components' meta-parameters and numbers of tasks, from which the learner answers."""
        metas = [flatten_meta(meta) for meta in self._metas()]
        named = {f"{at}.{name}": value for at, meta in enumerate(metas) for name, value in meta.items()}
        return {COUNTS: tensor(self._used_counts(), dtype=float64)} | named

    def believe(self, state: State, support: Batch) -> dict[str, Belief]:
        """Adapt every component to a support set; a pure function of ``state``.

        The weights are the responsibilities, with that of a new component, after as many inner steps; without any
        sample, their prior.
        """
        counts: list[float] = state[COUNTS].tolist()
        start = self._context.start
        metas = [*(_component_meta(state, at, start) for at in range(len(counts))), start]
        each = [believe_by_inner_loop(self.inner, meta, support) for meta in metas]
        return {suffix: self._mix_beliefs(support, counts, [belief[suffix] for belief in each]) for suffix in each[0]}

    def _mix_beliefs(self, support: Batch, counts: Sequence[float], beliefs: Sequence[Belief]) -> Belief:
        """Return the mixture of what the components and a new one believe."""
        shares = self._responsibilities(support, counts, beliefs)
        if not shares.sum():  # All losses are not finite: the initial parameters answer.
            shares[-1] = 1.0
        return _mix([(belief, share.log()) for belief, share in zip(beliefs, shares, strict=True) if share])

    def learn(self, *tasks: Task) -> Learned:
        """Assign the tasks scored since the last call to components, then make meta-steps with each component."""
        self._scored.take(tasks)
        context, first = self._context, self._round
        for engine in self._engines:
            engine.lr_scale = self.lr_scale * self._schedule(first)
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
            reports += self._step(samples, step)
            replayed += [sample.round for sample in samples]
        return Learned(tuple(replayed), tuple(reports))

    def learn_more(self, update: int) -> tuple[StepReport, ...]:
        """Make ``steps_per_round`` more meta-steps with each component, for ``update`` 0, 1, ... of the round."""
        self._scored.check_none()
        available = self._context.buffer.available(self._round)
        if not (self._components() and len(available)):
            return ()
        for engine in self._engines:
            engine.lr_scale = self.lr_scale * self._schedule(self._round - 1)
        self._sampler.resume_round(self._round - 1, available)
        steps = self._context.steps_per_round
        first = (update + 1) * steps
        return tuple(
            report
            for step in range(first, first + steps)
            for report in self._step(self._sampler.draw_samples(step), step)
        )

    def _components(self) -> list[int]:
        return [component for component, count in enumerate(self._counts) if count]

    def _metas(self) -> list[Meta]:
        return [self._engines[component].meta() for component in self._components()]

    def _responsibilities(self, support: Batch, counts: Sequence[float], beliefs: Sequence[Belief]) -> Tensor:
        """Return the responsibilities of the components, and of a new one if ``beliefs`` has an additional entry."""
        prior = crp_prior(counts, self._options.concentration)[: len(beliefs)]
        samples = count_samples(support) if support.weight is None else float(support.weight.sum())
        if not samples:
            return prior
        predictions = [predict(self.inner.loss, belief, support.x) for belief in beliefs]
        losses = [float(loss_of(prediction, support.y, support.weight)) for prediction in predictions]
        return responsibilities(prior, losses, samples, self._options.temperature)

    def _assign_responsibilities(self, support: Batch, metas: Sequence[Meta]) -> Tensor:
        """Return the responsibilities of the current components, and of a new one after them in ``metas``."""
        beliefs = [believe_by_inner_loop(self.inner, meta, support)[""] for meta in metas]
        return self._responsibilities(support, self._used_counts(), beliefs)

    def _used_counts(self) -> list[float]:
        return [self._counts[component] for component in self._components()]

    def _assign(self, task: Task) -> None:
        """Add a new task to the components' counts, or create a component for it; prune rarely used ones."""
        components, options = self._components(), self._options
        has_room = len(components) < options.most
        metas = [*self._metas(), *([self._context.start] if has_room else [])]
        shares = self._assign_responsibilities(task.support, metas)
        # Use the first rank's values: rounding may differ between machines, but all ranks must decide alike.
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

    def _step(self, samples: Sequence[ReplaySample], step: int) -> list[StepReport]:
        """Compute the responsibilities of the samples, then step each component that has any."""
        buffer, gather, context = self._context.buffer, self._context.gather, self._context
        distribute_samples(self.engine, buffer, samples)
        metas = self._metas()
        own = [self._try_responsibilities(sample.round, metas) for sample in local_samples(self.engine, samples)]
        by_rank: list[list[list[float]]] = gather(own)
        shares = [by_rank[at % self.engine.world][at // self.engine.world] for at in range(len(samples))]
        tasks = DrawnTasks(context.draw, buffer, context.seed + SEED_OFFSET, self._round - 1, step)
        reports = []
        for at, component in enumerate(self._components()):
            responsibility = [share[at] if share[at] >= NEGLIGIBLE else 0.0 for share in shares]
            if any(responsibility):
                weighted = [
                    ReplaySample(p.round, p.weight * b, p.share * b)
                    for p, b in zip(samples, responsibility, strict=True)
                ]
                engine = self._engines[component]
                reports.append(engine.apply(*sum_gradients(engine, self._gradient_sum, tasks, weighted)))
        return reports

    def _try_responsibilities(self, round: int, metas: Sequence[Meta]) -> list[float]:
        """Return the responsibilities of a revisited task; zeros if the model fails and failures are collected."""
        task, failures = self._context.buffer[round], self._context.failures
        try:
            found: list[float] = self._assign_responsibilities(task.support, metas).tolist()
            return found
        except Exception as error:
            if failures is None or not is_task_failure(error):
                raise
            failures.add(round, error)
            return [0.0] * len(metas)

    def _predicted_rounds(self) -> Iterator[int]:
        """Yield the existing rounds that this rank will probably revisit next."""
        for samples in self._sampler.predict_samples(self._context.steps_per_round):
            yield from (sample.round for sample in local_samples(self.engine, samples) if sample.round < self._round)

    def save(self, keep: TensorFilter | None = None) -> Params:
        """Return the state of the components' engines, their counts, and the replay policy's memory."""
        saved = self._sampler.save(keep)
        if keep is None or keep(COUNTS):
            saved[COUNTS] = tensor(self._counts, dtype=float64)
        for component in self._components():
            mine = _component_filter(component, keep)
            saved |= {f"{component}.{name}": value for name, value in self._engines[component].save(mine).items()}
        return saved

    def load(self, saved: Params, rounds: int) -> None:
        """Restore the state that ``save`` returned after ``rounds`` learned rounds."""
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
            "first two must be above 0, and most at least 1"
        )
    if not (options.horizon > 1 and 0 <= options.fewest < 1):
        raise ValueError(
            f"horizon is {options.horizon} and fewest {options.fewest}: horizon must be above 1, and fewest at least 0 "
            "and below 1, because a component starts with one task"
        )


def _include_round(samples: list[ReplaySample], new: int) -> list[ReplaySample]:
    """Return the samples with the round ``new`` in place of the last one, unless it is already among them."""
    return samples if any(sample.round == new for sample in samples) else [*samples[:-1], ReplaySample(new)]


def _skip_unassigned(sum_tasks: SkippingSum) -> SkippingSum:
    """Return ``sum_tasks`` restricted to the tasks with a share above 0."""

    def sum_members(meta: Meta, tasks: Sequence[Task], samples: Sequence[ReplaySample]) -> tuple[MetaGrad, float]:
        members = [(task, sample) for task, sample in zip(tasks, samples, strict=True) if sample.share]
        return sum_tasks(meta, [task for task, _ in members], [sample for _, sample in members])

    return sum_members


def _mix(beliefs: Sequence[tuple[Belief, Tensor]]) -> Belief:
    """Return the mixture of beliefs, each with the logarithm of its share."""
    params = {name: torch.cat([belief.params[name] for belief, _ in beliefs]) for name in beliefs[0][0].params}
    return Belief(params, torch.cat([belief.log_weights + share.to(belief.log_weights) for belief, share in beliefs]))


def _component_meta(state: State, component: int, like: Meta) -> Meta:
    return unflatten_meta({name: state[f"{component}.{name}"] for name in flatten_meta(like)})


def _component_filter(component: int, keep: TensorFilter | None) -> Callable[[str], bool] | None:
    return None if keep is None else lambda name: keep(f"{component}.{name}")


def build(
    context: LearnerContext,
    concentration: Annotated[float, Gt(0)] = 1.0,
    temperature: Annotated[float, Gt(0)] = 1.0,
    most: Annotated[int, Ge(1)] = 6,
    horizon: Annotated[float, Gt(1)] = 1000.0,
    fewest: Annotated[float, Ge(0), Lt(1)] = 0.1,
    optimizer: str = OPTIMIZER,
    lr: Annotated[float, Gt(0)] = LR,
) -> DirichletProcessMixture:
    """Create the Dirichlet-process mixture; ``MixtureOptions`` describes the first options.

    ``optimizer`` is the optimizer of each component, as in [meta]; ``lr`` is its learning rate, above 0, constant over
    the rounds.
    """
    options = MixtureOptions(concentration, temperature, most, horizon, fewest)
    return DirichletProcessMixture(use_own_optimizer(context, optimizer, lr), options)
