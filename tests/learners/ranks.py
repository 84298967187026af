"""Several ranks as threads: each engine adds the sums of all ranks before a step, in a fixed order or not."""

import threading
from concurrent.futures import ThreadPoolExecutor

import online_meta as om
from online_meta.testing.learner_problems import frozen
from online_meta.tree import add


class Exchange:
    """Gathers one value from every rank and returns all of them to each rank."""

    def __init__(self, world):
        self._values, self._barrier = [None] * world, threading.Barrier(world, timeout=250)

    def gather(self, rank, value):
        self._values[rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values


class RankOf(om.MetaOptimizer):
    """The engine of one of ``world`` ranks; with ``in_order``, the learner adds the gathered sums itself."""

    def __init__(self, meta, exchange, rank, world, in_order, lr, name="sgd"):
        super().__init__(meta, name, lr)
        self.rank, self.world, self._exchange = rank, world, exchange
        self.gather = (lambda *share: exchange.gather(rank, share)) if in_order else None

    def apply(self, sums, weight):
        if self.gather is None:
            (sums, weight), *others = self._exchange.gather(self.rank, (sums, weight))
            for found, share in others:
                sums, weight = add(sums, found), weight + share
        return super().apply(sums, weight)


def play_on_ranks(world, in_order, build, tasks, lr):
    """Return each rank's results and its learner; ``build`` takes the engine and ``gather`` of the context."""
    exchange = Exchange(world)

    def make(rank):
        return build(
            engine=lambda meta: RankOf(meta, exchange, rank, world, in_order, lr),
            gather=lambda value: exchange.gather(rank, value),
        )

    def play(learner):
        return [(learner.score(task), learner.learn(task)) for task in tasks], learner

    learners = [make(rank) for rank in range(world)]  # Not in the threads: they share torch's generator.
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(play, learners))


def check_ranks_agree(world, in_order, build, tasks, lr):
    """Check that a learner on every rank has the results and the bits of a single learner."""
    alone = build()
    single = [(alone.score(task), alone.learn(task)) for task in tasks]
    for one, learner in play_on_ranks(world, in_order, build, tasks, lr):
        assert repr(one) == repr(single)  # compared as text because nan != nan
        assert frozen(learner.save()) == frozen(alone.save())
