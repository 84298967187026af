"""A Dirichlet-process mixture of meta-initialisations, for streams whose tasks come in clusters."""

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, NamedTuple

from annotated_types import Ge, Gt, Lt
from torch import Tensor, float64, tensor

from online_meta.draws import Pick
from online_meta.finite import FiniteSum, sum_finite
from online_meta.functional import judged
from online_meta.meta_optimizer import named
from online_meta.mixtures import crp_prior, responsibilities
from online_meta.replay.uniform import uniform
from online_meta.revisits import Revisits
from online_meta.schedules.constant import constant
from online_meta.score import ScoredTasks, judge_prefixes, score_task
from online_meta.setup import LearnerSetup
from online_meta.shared_sums import hand_out, own_picks, sum_picks
from online_meta.summing import TaskSum
from online_meta.types import Engine, Keep, Learned, Meta, MetaGrad, Params, Score, StepReport, Task

STREAM = 5
"""Sets this learner's draws apart from those of others with the same seed."""

COUNTS = "counts"
"""The name, in what is saved, of the number of tasks of each component; 0 where there is none."""

NEGLIGIBLE = 1e-3
"""Responsibilities below it count as none: gradients of so little weight are not worth their time."""


class Options(NamedTuple):
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

    def __init__(self, setup: LearnerSetup, options: Options) -> None:
        """Begin at round 0 without a component. Raises ``ValueError`` for an option out of its range."""
        _check(options)
        self._setup, self._options = setup, options
        self._engines = [setup.engine(setup.start) for _ in range(options.most)]
        self._counts = [0.0] * options.most
        self._round = 0
        self._loss = judged(setup.inner.loss)
        self.total = TaskSum(setup.gradient, setup.programs)
        self._gradient = _without_strangers(sum_finite(self.total))
        # A policy that measures the leader's gradients finds here not one but several.
        replay = setup.replay if setup.replay.measure is None else uniform()
        self._revisits = Revisits(replay, setup.seed + STREAM, setup.batch, setup.gather)
        self._schedule = constant() if setup.schedule is None else setup.schedule
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
        return judge_prefixes(self._judge, task, prefixes)

    def _judge(self, task: Task) -> Score:
        metas = [*self._metas(), self._setup.start]
        chosen = int(self._explain(task, metas).argmax())
        return score_task(self._setup.inner, metas[chosen], task, self._setup.accuracy)

    def learn(self, *tasks: Task) -> Learned:
        """Assign the tasks scored since the last call, then make this update's meta-steps with each component."""
        self._scored.take(tasks)
        setup, first = self._setup, self._round
        for engine in self._engines:
            engine.lr_scale = self._schedule(first)
        for task in tasks:
            setup.past.remember(self._round, task)
            self._assign(task)
            self._round += 1
        self._revisits.begin(self._round - 1, setup.past.kept(self._round))
        setup.past.expect(self, self._foreseen())
        replayed: list[int] = []
        reports: list[StepReport] = []
        for step in range(setup.steps_per_round if self._places() else 0):
            picks = _with_new(self._revisits.picks(step), first + step % len(tasks))
            reports += self._step(picks)
            replayed += [pick.round for pick in picks]
        return Learned(tuple(replayed), tuple(reports))

    def learn_more(self, update: int) -> tuple[StepReport, ...]:
        """Make ``steps_per_round`` more meta-steps with each component, the ``update``-th time since the last round."""
        self._scored.check_none()
        if not self._places():
            return ()
        for engine in self._engines:
            engine.lr_scale = self._schedule(self._round - 1)
        self._revisits.again(self._round - 1, self._setup.past.kept(self._round))
        steps = self._setup.steps_per_round
        first = (update + 1) * steps
        return tuple(
            report for step in range(first, first + steps) for report in self._step(self._revisits.picks(step))
        )

    def _places(self) -> list[int]:
        return [place for place, count in enumerate(self._counts) if count]

    def _metas(self) -> list[Meta]:
        return [self._engines[place].meta() for place in self._places()]

    def _explain(self, task: Task, metas: Sequence[Meta]) -> Tensor:
        """Return the responsibilities of the components, and of a new one if ``metas`` has one more for it."""
        prior = crp_prior([self._counts[place] for place in self._places()], self._options.concentration)
        fits = [float(self._loss(self._setup.inner.adapt(meta, task.support), task.support)) for meta in metas]
        return responsibilities(prior[: len(metas)], fits, len(task.support.y), self._options.temperature)

    def _assign(self, task: Task) -> None:
        """Count a new task to the components, or let it found one; prune those that are hardly used any more."""
        places, options = self._places(), self._options
        room = len(places) < options.most
        shares = self._explain(task, [*self._metas(), *([self._setup.start] if room else [])])
        # Ranks on unlike machines may differ in the last bit; they must not differ in what they do.
        own: list[float] = self._setup.gather(shares.tolist())[0]
        kept = [count * (1 - 1 / options.horizon) for count in self._counts]
        if room and own[-1] > 0 and own[-1] == max(own):
            place = self._counts.index(0.0)
            self._engines[place].load(named(self._setup.start))
            kept[place] = 1.0
        else:
            whole = sum(own[: len(places)]) or 1.0
            for place, share in zip(places, own, strict=False):
                kept[place] += share / whole
        self._counts = [count if count >= options.fewest else 0.0 for count in kept]

    def _step(self, picks: Sequence[Pick]) -> list[StepReport]:
        """Find the picks' responsibilities, then step each component that has any."""
        past, gather = self._setup.past, self._setup.gather
        hand_out(self.engine, past, picks)
        metas = self._metas()
        own = [self._explain(past[pick.round], metas).tolist() for pick in own_picks(self.engine, picks)]
        by_rank: list[list[list[float]]] = gather(own)
        shares = [by_rank[at % self.engine.world][at // self.engine.world] for at in range(len(picks))]
        reports = []
        for at, place in enumerate(self._places()):
            belong = [share[at] if share[at] >= NEGLIGIBLE else 0.0 for share in shares]
            if any(belong):
                own_ones = [Pick(p.round, p.weight * b, p.share * b) for p, b in zip(picks, belong, strict=True)]
                engine = self._engines[place]
                reports.append(engine.apply(*sum_picks(engine, self._gradient, past, own_ones)))
        return reports

    def _foreseen(self) -> Iterator[int]:
        """Tell what this rank will probably revisit, of the rounds that are there."""
        for picks in self._revisits.foresee(self._setup.steps_per_round):
            yield from (pick.round for pick in own_picks(self.engine, picks) if pick.round < self._round)

    def save(self, keep: Keep | None = None) -> Params:
        """Return the state of the components' engines, their counts, and the memory of the replay."""
        saved = self._revisits.save(keep)
        if keep is None or keep(COUNTS):
            saved[COUNTS] = tensor(self._counts, dtype=float64)
        for place in self._places():
            mine = _under(place, keep)
            saved |= {f"{place}.{name}": value for name, value in self._engines[place].save(mine).items()}
        return saved

    def load(self, saved: Params, rounds: int) -> None:
        """Take up what ``save`` gave after ``rounds`` learned rounds."""
        rest = self._revisits.load(saved)
        self._counts = rest[COUNTS].tolist()
        for place in self._places():
            start = f"{place}."
            self._engines[place].load({n.removeprefix(start): v for n, v in rest.items() if n.startswith(start)})
        self._round, self._scored = rounds, ScoredTasks()


def _check(options: Options) -> None:
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


def _with_new(picks: list[Pick], new: int) -> list[Pick]:
    """Return the picks with the round ``new`` among them, in place of the last where it is not."""
    return picks if any(pick.round == new for pick in picks) else [*picks[:-1], Pick(new)]


def _without_strangers(summed: FiniteSum) -> FiniteSum:
    """Return the sum over the tasks that have a share in it."""

    def sum_members(meta: Meta, tasks: Sequence[Task], picks: Sequence[Pick]) -> tuple[MetaGrad, float]:
        members = [(task, pick) for task, pick in zip(tasks, picks, strict=True) if pick.share]
        return summed(meta, [task for task, _ in members], [pick for _, pick in members])

    return sum_members


def _under(place: int, keep: Keep | None) -> Callable[[str], bool] | None:
    return None if keep is None else lambda name: keep(f"{place}.{name}")


def build(
    setup: LearnerSetup,
    concentration: Annotated[float, Gt(0)] = 1.0,
    temperature: Annotated[float, Gt(0)] = 1.0,
    most: Annotated[int, Ge(1)] = 6,
    horizon: Annotated[float, Gt(1)] = 1000.0,
    fewest: Annotated[float, Ge(0), Lt(1)] = 0.1,
) -> DirichletProcessMixture:
    """Return the baseline; ``Options`` says what its options are."""
    return DirichletProcessMixture(setup, Options(concentration, temperature, most, horizon, fewest))
