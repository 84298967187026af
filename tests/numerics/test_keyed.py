"""Numbers that are drawn by key: functions of the task, the step, the role and the seed, however tasks are computed."""

import threading

import pytest
import torch
from scipy import stats
from torch.func import functionalize, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

import online_meta as om
from online_meta.batches import map_tensors
from online_meta.functional.activation_checkpoint import recompute_on_backward
from online_meta.functional.keyed import ROLES, keyed, normal_like, normal_like_all, uniform_like
from online_meta.functional.randomness import checksum
from online_meta.inner import query_loss, run_inner_loop, see_support
from online_meta.testing.compare import relative_error
from online_meta.testing.learned_rules import draws_by_key
from tests.numerics.problems import problem, regression_task
from tests.numerics.reference_loop import check_slope, join_parts

RULES = {
    "bayes_by_gradient": lambda: om.rules.bayes_by_gradient(log_std=-2.0),
    "platipus": om.rules.platipus,
    "draws_by_key": draws_by_key,
}
SIZES = [1, 5, 16, 1761]
"""Sizes at which torch's vectorised loops have a tail, and sizes at which they have none."""


def draw(x, y, size, step=1, role="step", seed=0):
    with keyed(om.Batch(x, y), step, role, seed):
        like = x.new_zeros(size)
        return normal_like(like), uniform_like(like), normal_like(like)


def tasks(count, dtype=torch.float64):
    random = torch.Generator().manual_seed(3)
    return torch.randn(count, 6, 2, generator=random, dtype=dtype), torch.randint(5, (count, 6), generator=random)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_vmap_and_a_recorded_program_draw_the_bits_of_the_loop(size, dtype):
    x, y = tasks(4, dtype)
    one_by_one = [
        torch.stack(each) for each in zip(*(draw(*task, size) for task in zip(x, y, strict=True)), strict=True)
    ]
    mapped = vmap(lambda x, y: draw(x, y, size))
    program = make_fx(functionalize(mapped))(x.flip(0).clone(), y.flip(0).clone())  # of the tasks in another order
    for found in (mapped(x, y), program(x, y)):
        assert all(torch.equal(a, b) for a, b in zip(found, one_by_one, strict=True))
    assert not torch.equal(one_by_one[0], one_by_one[2]), "each call draws further numbers"


def test_numbers_are_normal_and_uniform():
    x, y = (one[0] for one in tasks(1))
    normal, uniform, other = draw(x, y, 200_000)
    assert stats.kstest(normal.numpy(), "norm").pvalue > 0.01
    assert stats.kstest(uniform.numpy(), "uniform").pvalue > 0.01
    assert abs(float((normal * other).mean())) < 0.01
    assert abs(float((normal[1:] * normal[:-1]).mean())) < 0.01
    assert uniform.min() > 0
    assert uniform.max() < 1
    half = draw(x.float(), y, 200_000)[1]
    assert half.min() > 0
    assert half.max() < 1


def test_the_streams_of_tasks_do_not_correlate():
    """The largest of 300 correlations over 2,000 numbers is about 3.3 / sqrt(2000) = 0.07 by chance."""
    streams = torch.stack([draw(*task, 2000)[0] for task in zip(*tasks(25), strict=True)])
    found = torch.corrcoef(streams) - torch.eye(25)
    assert found.abs().max() < 0.1


def test_one_changed_bit_changes_everything():
    x, y = (one[0] for one in tasks(1))
    changed = x.clone()
    changed[3, 1] = torch.nextafter(x[3, 1], torch.tensor(9.0, dtype=x.dtype))
    other = y.clone()
    other[2] += 1
    first = draw(x, y, 2000)[0]
    for one in (draw(changed, y, 2000), draw(x, other, 2000), draw(x.flip(0), y.flip(0), 2000)):
        assert abs(float(torch.corrcoef(torch.stack([first, one[0]]))[0, 1])) < 0.1


def test_each_role_step_and_seed_has_its_own_numbers():
    """Where support and query are equal, they still draw different numbers."""
    x, y = (one[0] for one in tasks(1))
    ways = [{"role": role} for role in ROLES] + [{"step": 2}, {"step": 0}, {"seed": 1}, {"seed": -1}]
    drawn = [draw(x, y, 4, **way)[0] for way in ways]
    assert len({tuple(one.tolist()) for one in drawn}) == len(ways)
    assert torch.equal(draw(x, y, 4)[0], draw(x, y, 4, role="step")[0])


def test_an_inner_loop_draws_differently_for_support_and_query():
    module, loss, _ = given = problem("mlp_tanh")
    seen = []

    def noisy(params, batch):
        seen.append(normal_like(batch.x))
        return om.model_loss(module, loss)(params, om.Batch(batch.x + 0.1 * seen[-1], batch.y))

    noisy.random = "keyed"
    inner = om.Inner(noisy, draws_by_key(), 2)
    meta, batch = inner.init(given.weights()), regression_task().support
    with torch.no_grad():
        for k in range(2):
            see_support(inner, meta, meta.weights, batch, k)
        query_loss(inner, meta, meta.weights, batch)
        see_support(inner, meta, meta.weights, batch, 0)
    first, second, query, again = seen
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, query)


def test_tensors_that_draw_together_have_the_numbers_of_one_vector():
    x, y = (one[0] for one in tasks(1))
    like = {"a": torch.zeros(3, 2), "b": torch.zeros(5, dtype=torch.float64), "c": torch.zeros(())}
    with keyed(om.Batch(x, y), 1, "step"):
        found = normal_like_all(like)
    whole = draw(x, y, 12)[0]
    assert [(one.shape, one.dtype) for one in found.values()] == [(one.shape, one.dtype) for one in like.values()]
    assert torch.equal(torch.cat([one.flatten().double() for one in found.values()]).float(), whole.float())


def test_flat_dicts_and_weights_are_part_of_the_key():
    x, y = (one[0] for one in tasks(1))

    def first(batch):
        with keyed(batch, 0, "begin"):
            return normal_like(x)

    batch = om.Batch({"a": x, "b": y}, y)
    assert torch.equal(first(batch), first(om.Batch({"b": y, "a": x}, y)))
    others = [om.Batch({"a": x, "b": y + 1}, y), om.Batch({"a": x, "b": y}, y, torch.full((6,), 2.0)), om.Batch(x, y)]
    assert not any(torch.equal(first(batch), first(other)) for other in others)
    assert first(om.Batch(x[:0], y[:0])).isfinite().all()


def test_padding_changes_no_number():
    """So a task that is padded to another size, in any place, draws what it drew; weights of 1 are as none."""
    x, y = (one[0] for one in tasks(1))

    def first(batch):
        with keyed(batch, 0, "begin"):
            return normal_like(x)

    weight = torch.tensor([2.0, 1.0, 0.5, 1.0, 1.0, 3.0])
    for given in (None, weight):
        right = first(om.Batch(x, y, given))
        for rows in ([0, 1, 2, 3, 4, 5, -1, -1], [-1, 0, 1, -1, -1, 2, 3, 4, 5]):
            at = torch.tensor(rows)
            padded = torch.where(at < 0, 0.0, (torch.ones(6) if given is None else given)[at])
            batch = om.Batch({"a": x[at]}, y[at], padded)
            assert torch.equal(first(om.Batch(x[at], y[at], padded)), right)
            found = vmap(first)(map_tensors(lambda part: torch.stack([part, part]), batch))
            assert torch.equal(found[1], first(om.Batch({"a": x}, y, given)))
        assert checksum(om.Batch(x[at], y[at], padded)) == checksum(om.Batch(x, y, given))
    assert checksum(om.Batch(x, y, torch.ones(6))) == checksum(om.Batch(x, y))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64, torch.bool, torch.uint8])
def test_every_dtype_of_a_batch_gives_a_key(dtype):
    x = torch.arange(6).to(dtype)
    with keyed(om.Batch(x, x), 0, "begin"):
        assert normal_like(torch.zeros(3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_drawing_without_a_key_is_refused():
    with pytest.raises(RuntimeError, match='random="keyed"'):
        normal_like(torch.zeros(3))
    x, y = (one[0] for one in tasks(1))
    with keyed(om.Batch(x, y), 0, "begin"), pytest.raises(ValueError, match=r"dtype torch\.int64 are not drawn"):
        uniform_like(y)
    with (
        pytest.raises(ValueError, match="the role is 'support': it is one of begin"),
        keyed(om.Batch(x, y), 0, "support"),
    ):
        pass


def test_threads_draw_at_the_same_time():
    """The context of one thread is open while another one draws: neither waits, and neither disturbs the other."""
    (x, other), (y, last) = tasks(2)
    right = [draw(x, y, 4), draw(other, last, 4)]
    found = []
    with keyed(om.Batch(x, y), 1, "step"):
        thread = threading.Thread(target=lambda: found.append(draw(other, last, 4)), daemon=True)
        thread.start()
        thread.join(200)
        assert torch.equal(normal_like(x.new_zeros(4)), right[0][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0], right[1], strict=True))


def test_torchs_generator_is_not_used():
    before = torch.get_rng_state()
    draw(*(one[0] for one in tasks(1)), 5)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_recomputation_in_the_backward_pass_draws_the_same_numbers():
    x, y = (one[0] for one in tasks(1))

    def noisy(value):
        return ((value * normal_like(value)).sin(),)

    found = []
    for function in (noisy, recompute_on_backward(noisy, random=True)):
        leaf = x.clone().requires_grad_()
        with keyed(om.Batch(x, y), 1, "step"):
            (output,) = function(leaf)
        found.append((output, *torch.autograd.grad(output.sum(), leaf)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def objective_of(inner):
    """Return the query loss as ``exact`` differentiates it, for ``check_slope``: the adapted loss draws otherwise."""

    class Adapting:
        @staticmethod
        def adapt(meta, support):
            return meta, run_inner_loop(inner, meta, support).phi

        @staticmethod
        def loss(adapted, query):
            return query_loss(inner, *adapted, query)

    return Adapting


@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", ["mlp_tanh", "conv_group_norm"])
def test_the_meta_gradient_of_a_stochastic_rule_is_the_slope(make, name):
    given = problem(name)
    inner = om.Inner(om.model_loss(given.module, given.loss), make(), 3)
    meta = inner.init(given.weights())
    for seed in range(2):
        task = given.task(seed)
        check_slope(objective_of(inner), meta, task, om.exact(inner)(meta, task))


@pytest.mark.parametrize("batching", ["vmap", "traced"])
@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
def test_stochastic_rules_run_under_vmap_and_as_programs(make, batching):
    given = problem("mlp_tanh")
    inner = om.Inner(om.model_loss(given.module, given.loss), make(), 2)
    meta = inner.init(given.weights())
    together, one_by_one = (om.over_tasks(om.exact(inner), how) for how in (batching, "loop"))
    for seeds in (range(3), range(3, 6)):
        batch = [given.task(seed) for seed in seeds]
        found, right = together(meta, batch), one_by_one(meta, batch)
        torch.testing.assert_close(found.loss, right.loss, rtol=1e-12, atol=0)
        assert relative_error(join_parts(found.grads), join_parts(right.grads)) < 1e-10


def test_a_model_may_draw_by_key():
    class Noisy(torch.nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return y + normal_like(y) if self.training else y

    module = Noisy(4, 2).double()
    loss = om.model_loss(module, "mse", random="keyed")
    inner = om.Inner(loss, om.rules.sgd(lr=0.1), 2)
    meta, task = inner.init(dict(module.named_parameters())), regression_task()
    right = om.exact(inner)(meta, task)
    assert all(
        torch.equal(a, b) for a, b in zip(tree_leaves(right), tree_leaves(om.exact(inner)(meta, task)), strict=True)
    )
    assert not torch.equal(right.loss, loss.evaluate(inner.adapt(meta, task.support), task.query))
    others = om.over_tasks(om.exact(inner), "vmap")(meta, [task, task])
    assert relative_error(others.grads.weights, right.grads.weights) < 1e-10
    other_seed = om.Inner(loss, om.rules.sgd(lr=0.1), 2, seed=1)
    assert relative_error(om.exact(other_seed)(meta, task).grads.weights, right.grads.weights) > 1e-3
