"""Several ranks as threads: engines that sum over them before each step, in order or not."""

import threading
from concurrent.futures import ThreadPoolExecutor

import online_meta as om
from online_meta.testing.learner_problems import frozen
from online_meta.tree import add


class Exchange:
    """What all ranks give, all get."""

    def __init__(self, world):
        self._values, self._here = [None] * world, threading.Barrier(world, timeout=250)

    def gather(self, rank, value):
        self._values[rank] = value
        self._here.wait()
        values = list(self._values)
        self._here.wait()
        return values


class RankOf(om.MetaOptimizer):
    """One of ``world`` ranks; where the ranks sum in order, the learner adds up what ``gather`` gives."""

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
    """Return what each rank's learner said, and the learner; ``build`` makes it of what its set-up is to have."""
    exchange = Exchange(world)

    def make(rank):
        return build(
            engine=lambda meta: RankOf(meta, exchange, rank, world, in_order, lr),
            gather=lambda value: exchange.gather(rank, value),
        )

    def play(learner):
        return [(learner.score(task), learner.learn(task)) for task in tasks], learner

    learners = [make(rank) for rank in range(world)]  # Not in the threads: weights are drawn by torch's one generator.
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(play, learners))


def expect_one_answer(world, in_order, build, tasks, lr):
    """Let a learner alone and one on each rank play the tasks: all say the same and hold the same bits."""
    alone = build()
    said = [(alone.score(task), alone.learn(task)) for task in tasks]
    for one, learner in play_on_ranks(world, in_order, build, tasks, lr):
        assert repr(one) == repr(said)  # by its words, for nan is not nan
        assert frozen(learner.save()) == frozen(alone.save())
