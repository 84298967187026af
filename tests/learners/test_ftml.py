"""Follow the Meta-Leader has the same parameters after n rounds as a slow loop over explicit samples."""

import threading
from functools import partial

import pytest
import torch

import online_meta as om
from online_meta.learners import MemoryReplayBuffer, ftml
from online_meta.replay import ReplayPolicy, ReplayRequest, ReplaySample
from online_meta.replay.all import all as every_round
from online_meta.replay.uniform import uniform
from online_meta.testing.compare import assert_close
from online_meta.testing.learner_problems import (
    LR,
    STEPS,
    frozen,
    net,
    optimizer,
    remembered,
    setup,
    stream,
    weights_of,
)
from online_meta.types import StepReport
from tests.learners import slow

ROUNDS = 6
EXACT = 1e-12


def uneven() -> ReplayPolicy:
    """Revisit every second round, weighting newer rounds more."""

    def sample(memory: om.Params, request: ReplayRequest) -> list[ReplaySample]:
        return [ReplaySample(round, 1.0 + round**2, 2.0 + round) for round in request.rounds][
            request.step % 2 :: 2
        ] or [ReplaySample(0, 3.0)]

    return ReplayPolicy(sample)


def play(learner, tasks):
    return [(learner.score(task), learner.learn(task))[1] for task in tasks]


def reference(tasks, replay, batch, steps_per_round, seed=5):
    """Return the weights after each round."""
    module, found = net(), []
    adam = torch.optim.Adam(module.parameters(), lr=0.01)
    for round in range(len(tasks)):
        for step in range(steps_per_round):
            samples = replay.sample({}, ReplayRequest(seed, round, step, range(round + 1), batch))
            slow.follow(module, adam, tasks, samples, LR, STEPS)
        found.append(weights_of(module))
    return found


@pytest.mark.parametrize("steps_per_round", [1, 3])
@pytest.mark.parametrize("replay", [uniform(), every_round(), uneven()])
def test_the_leader_equals_that_of_a_slow_loop(replay, steps_per_round):
    tasks = stream(ROUNDS)
    learner = ftml.build(setup(replay=replay, steps_per_round=steps_per_round))
    for task, right in zip(tasks, reference(tasks, replay, 3, steps_per_round), strict=True):
        learner.score(task)
        assert len(learner.learn(task).steps) == steps_per_round
        assert_close(learner.engine.meta().weights, right, EXACT)


def test_tasks_of_different_sizes_are_revisited_together():
    tasks = stream(4)
    tasks[1] = om.Task(om.Batch(*(t[:1] for t in tasks[1].support)), om.Batch(*(t[:2] for t in tasks[1].query)))
    learner = ftml.build(setup(replay=every_round(), steps_per_round=1))
    play(learner, tasks)
    assert_close(learner.engine.meta().weights, reference(tasks, every_round(), 3, 1)[-1], EXACT)


def test_full_replay_uses_every_round_at_every_step():
    learner = ftml.build(setup(replay=every_round(), batch=2, steps_per_round=2))
    learned_rounds = play(learner, stream(5))
    assert [learned.replayed for learned in learned_rounds] == [tuple(range(n)) * 2 for n in range(1, 6)]


def test_the_policy_samples_from_all_rounds_up_to_the_current_one():
    requests = []

    def spy(memory, request):
        requests.append(request)
        return uniform().sample(memory, request)

    learner = ftml.build(setup(replay=ReplayPolicy(spy), steps_per_round=2, batch=2, seed=9))
    first, second, third = stream(3)
    play(learner, [first])
    for task in (second, third):
        learner.score(task)
    learner.learn(second, third)
    one, three = range(1), range(3)
    assert requests == [
        ReplayRequest(9, 0, 0, one, 2),
        ReplayRequest(9, 0, 1, one, 2),
        ReplayRequest(9, 2, 0, three, 2),
        ReplayRequest(9, 2, 1, three, 2),
    ]


def test_different_seeds_sample_different_rounds():
    tasks = stream(8)
    one, two = (ftml.build(setup(seed=seed)) for seed in (0, 1))
    assert [a.replayed for a in play(one, tasks)] != [b.replayed for b in play(two, tasks)]
    assert frozen(one.save()) != frozen(two.save())


class SharedSums:
    """The parts of the sum that ranks in different threads exchange at each step."""

    def __init__(self, world: int) -> None:
        self.parts: dict[int, tuple[om.MetaGrad, float]] = {}
        self.all_here = threading.Barrier(world, timeout=60)
        self.weights: list[float] = []


class Rank:
    """The engine of one rank: it holds all parameters and steps on the sum over ranks."""

    gather = None

    def __init__(self, meta: om.Meta, rank: int, world: int, shared: SharedSums) -> None:
        self.rank, self.world, self._post, self._own = rank, world, shared, optimizer(meta)
        self.meta, self.save, self.load = self._own.meta, self._own.save, self._own.load

    def apply(self, sums: om.MetaGrad, weight: float) -> StepReport:
        self._post.parts[self.rank] = (sums, weight)
        self._post.all_here.wait()
        parts = [self._post.parts[rank] for rank in range(self.world)]
        self._post.all_here.wait()
        total = om.MetaGrad(
            sum(part.loss for part, _ in parts),
            om.Meta({n: sum(part.grads.weights[n] for part, _ in parts) for n in sums.grads.weights}, {}),
        )
        weight = sum(w for _, w in parts)
        if self.rank == 0:
            self._post.weights.append(weight)
        return self._own.apply(total, weight)


@pytest.mark.parametrize(("world", "replay"), [(2, uniform()), (2, uneven()), (3, every_round())])
def test_ranks_that_share_each_step_agree_with_a_single_process(world, replay):
    """In the first rounds some ranks have no task; later they have unequal numbers of tasks."""
    tasks, shared = stream(ROUNDS), SharedSums(world)
    alone = ftml.build(setup(replay=replay))
    right = play(alone, tasks)
    learned_rounds: dict[int, list[om.Learned]] = {}
    learners = [
        ftml.build(setup(replay=replay, engine=lambda meta, rank=rank: Rank(meta, rank, world, shared)))
        for rank in range(world)
    ]
    threads = [
        threading.Thread(
            target=lambda rank=rank: learned_rounds.update({rank: play(learners[rank], tasks)}), daemon=True
        )
        for rank in range(world)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    requests = [ReplayRequest(5, round, step, range(round + 1), 3) for round in range(ROUNDS) for step in range(2)]
    shares = [sum(sample.share for sample in replay.sample({}, request)) for request in requests]
    assert shared.weights == shares, "no two ranks take the same task"
    for rank in range(world):
        assert [learned.replayed for learned in learned_rounds[rank]] == [learned.replayed for learned in right]
        assert_close(learners[rank].engine.meta().weights, alone.engine.meta().weights, EXACT)
        assert frozen(learners[rank].save()) == frozen(learners[0].save())


def measuring_policy(recorded) -> ReplayPolicy:
    """Revisit two rounds, and record their losses."""

    def sample(memory, request):
        assert memory["seen"] == len(recorded[request.seed])
        return [ReplaySample(round, 2.0) for round in request.rounds[-2:]]

    def record(memory, request, rounds, values):
        recorded[request.seed].append((request.round, request.step, rounds, values))
        return {"seen": memory["seen"] + 1}

    return ReplayPolicy(
        sample, lambda: {"seen": torch.tensor(0)}, measure=lambda found: found.loss.reshape(1), record=record
    )


def test_a_measuring_policy_records_losses_from_before_the_step():
    tasks, recorded = stream(3), {5: []}
    learner = ftml.build(setup(replay=measuring_policy(recorded), steps_per_round=1))
    for round, task in enumerate(tasks):
        learner.score(task)
        before = om.Meta({name: weight.clone() for name, weight in learner.engine.meta().weights.items()}, {})
        right = [float(setup().gradient(before, one).loss) for one in tasks[: round + 1][-2:]]
        learner.learn(task)
        assert recorded[5][-1][:3] == (round, 0, list(range(round + 1))[-2:])
        assert recorded[5][-1][3].flatten().tolist() == right
    assert learner.save()["replay.seen"] == 3


def test_a_policys_memory_is_saved_and_restored():
    tasks, recorded = stream(6), {5: []}
    whole, first = (ftml.build(setup(replay=measuring_policy(recorded if n else {5: []}))) for n in (0, 1))
    play(whole, tasks)
    play(first, tasks[:3])
    rest = ftml.build(setup(replay=measuring_policy(recorded)))
    rest._buffer = remembered(tasks[:3])
    rest.load(first.save(), 3)
    play(rest, tasks[3:])
    assert frozen(rest.save()) == frozen(whole.save())


def test_ranks_exchange_their_measurements():
    tasks, world, shared = stream(ROUNDS), 2, SharedSums(2)
    recorded = [{5: []} for _ in range(world + 1)]
    play(ftml.build(setup(replay=measuring_policy(recorded[2]))), tasks)
    mail, here = {}, threading.Barrier(world, timeout=60)

    def gather(rank, value):
        mail[rank] = value
        here.wait()
        shares = [mail[other] for other in range(world)]
        here.wait()
        return shares

    def make(rank):
        engine = partial(Rank, rank=rank, world=world, shared=shared)
        return ftml.build(setup(replay=measuring_policy(recorded[rank]), engine=engine, gather=partial(gather, rank)))

    threads = [threading.Thread(target=play, args=(make(rank), tasks), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    rows = [[(*learned_rounds[:3], learned_rounds[3].tolist()) for learned_rounds in one[5]] for one in recorded]
    assert rows[0] == rows[1]
    assert [row[:3] for row in rows[0]] == [row[:3] for row in rows[2]]
    values, right = (torch.tensor([row[3] for row in rows[at][2:]]) for at in (0, 2))
    assert_close({"losses": values}, {"losses": right}, EXACT)


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"steps_per_round": 0}])
def test_a_learner_that_cannot_learn_is_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} (is )?0"):
        ftml.build(setup(**wrong))


def test_a_learner_can_be_built_from_the_public_names_alone():
    inner = om.Inner(om.model_loss(net(), "mse"), om.rules.sgd(lr=LR), STEPS)
    learner = om.FollowTheMetaLeader(inner, om.exact(inner), optimizer(inner.init(weights_of(net()))))
    play(learner, stream(3))
    assert learner.round == 3
    assert_close(learner.engine.meta().weights, reference(stream(3), every_round(), 25, 1)[-1], EXACT)


def test_the_parameters_of_the_rule_are_learned_too():
    """For a rule with a learned step size, w and lr follow the gradient of one function of both."""

    def update(rule, carry, seen, step):
        return carry._replace(phi={name: phi - rule["lr"] * seen.grads[name] for name, phi in carry.phi.items()})

    rule = om.rules.sgd()._replace(init=lambda w: {"lr": torch.tensor(LR, dtype=torch.float64)}, update=update)
    inner = om.Inner(om.model_loss(net(), "mse"), rule, STEPS)
    start, (task,) = inner.init(weights_of(net())), stream(1)
    context = setup(inner=inner, gradient=om.exact(inner), start=start, steps_per_round=1)
    learner = ftml.build(context)
    play(learner, [task])

    module, lr = net(), torch.tensor(LR, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([*module.parameters(), lr], lr=0.01)
    weights = dict(module.named_parameters())
    slow.loss_of(module, slow.adapt(module, weights, task.support, lr, STEPS), task.query).backward()
    adam.step()
    assert_close(learner.engine.meta().weights, weights_of(module), EXACT)
    assert_close(learner.engine.meta().rule, {"lr": lr.detach()}, EXACT)


def test_replayed_rounds_are_prefetched_one_round_before():
    class RecordingBuffer(MemoryReplayBuffer):
        def __init__(self):
            super().__init__()
            self.prefetched, self.read = [], []

        def prefetch(self, reader, rounds):
            self.prefetched.append(list(rounds))

        def __getitem__(self, round):
            self.read.append(round)
            return super().__getitem__(round)

    buffer, read_before = RecordingBuffer(), 0
    one = ftml.build(setup(buffer=buffer))
    for round, task in enumerate(stream(12)):
        one.score(task)
        buffer.read.clear()
        one.learn(task)
        assert len(buffer.prefetched) == round + 1
        assert buffer.prefetched[-1][: len(buffer.read)] == buffer.read
        if round:
            ahead = buffer.prefetched[-2][read_before:]
            assert ahead == [old for old in buffer.read if old < round], "every round except the newest, in order"
        read_before = len(buffer.read)
