"""Every way to sum meta-gradients over tasks gives the sum of the one-by-one loop."""

import logging
import subprocess
import sys

import psutil
import pytest
import torch

import online_meta as om
from online_meta.batching.autotune import MAX_OPERATIONS, Autotuner, benchmark_plan, choose_plan, fit_task_count
from online_meta.batching.compile import Compilation, trace
from online_meta.batching.plan import BATCHING_MODES, ExecutionPlan, Group, signature_of, stack, unstack, vmapped
from online_meta.batching.task_sum import TaskSum
from online_meta.memory import peak_bytes
from online_meta.testing.compare import assert_close
from tests.numerics.problems import problem

STEPS = 2


def setting(name="mlp_tanh", dtype=torch.float64, steps=STEPS, lr=0.1):
    """Return an exact estimator, meta-parameters, and a maker of tasks."""
    given = problem(name)
    inner = om.Inner(om.model_loss(given.module, given.loss), om.rules.sgd(lr=lr), steps)
    meta = inner.init({n: w.to(dtype) for n, w in given.weights().items()})

    def task(seed, support=5, query=4):
        made = given.task(seed, support, query)
        return om.Task(*(om.Batch(*(v.to(dtype) if v.is_floating_point() else v for v in batch)) for batch in made))

    return om.exact(inner), meta, task


def loop(gradient, meta, tasks, weights):
    return TaskSum(gradient)(meta, tasks, weights)


def same(found, right, tolerance=1e-10):
    assert_close(found.grads.weights, right.grads.weights, tolerance)
    torch.testing.assert_close(found.loss, right.loss, rtol=tolerance, atol=0)


@pytest.mark.parametrize("name", ["mlp_tanh", "conv_batch_norm", "conv_group_norm"])
@pytest.mark.parametrize("how", BATCHING_MODES[:3])
def test_tasks_of_several_shapes_are_grouped_cut_and_padded(how, name):
    gradient, meta, task = setting(name)
    tasks = [task(0), task(1, 6, 3), task(2), task(3), task(4, 6, 3), task(5), task(6), task(7, 7, 7)]
    weights = [1.0, 0.5, 2.0, 0.0, 3.0, 0.25, 1.5, 0.7]
    total = TaskSum(gradient)
    # Five tasks of the first shape by threes: one spare row; two of the second by threes: one chunk with a spare row.
    total.follow([ExecutionPlan(how, 3, signature_of(tasks[0])), ExecutionPlan(how, 3, signature_of(tasks[1]))])
    same(total(meta, tasks, weights), loop(gradient, meta, tasks, weights))


def test_compiled_programs_are_right_are_kept_and_give_the_same_bits_again(tmp_path):
    gradient, meta, task = setting(steps=1)
    tasks, weights = [task(k) for k in range(5)], [1.0, 2.0, 0.5, 3.0, 0.1]
    path = ExecutionPlan("compiled", 3, signature_of(tasks[0]))
    first, again = TaskSum(gradient, tmp_path), TaskSum(gradient, tmp_path)
    first.follow([path])
    found = first(meta, tasks, weights)
    same(found, loop(gradient, meta, tasks, weights))
    (kept,) = tmp_path.iterdir()
    made = kept.stat().st_mtime_ns
    again.follow([path])
    repeated = again(meta, tasks, weights)
    assert kept.stat().st_mtime_ns == made, "it was compiled twice"
    assert all(torch.equal(found.grads.weights[n], repeated.grads.weights[n]) for n in meta.weights)
    kept.unlink()  # And compiled anew, too.
    anew = TaskSum(gradient, tmp_path)
    anew.follow([path])
    once_more = anew(meta, tasks, weights)
    assert all(torch.equal(found.grads.weights[n], once_more.grads.weights[n]) for n in meta.weights)


def test_a_stack_of_tasks_is_taken_as_it_is():
    gradient, meta, task = setting()
    tasks = [task(k) for k in range(4)]
    stacked = om.Task(*(om.Batch(*(torch.stack(v) for v in zip(*b, strict=True))) for b in zip(*tasks, strict=True)))
    right = om.over_tasks(gradient, "loop")(meta, tasks)
    for how in ("auto", "loop", "vmap", "traced"):
        same(om.over_tasks(gradient, how)(meta, stacked), right)
        same(om.over_tasks(gradient, how)(meta, tasks), right)
    assert all(torch.equal(a.support.x, b.support.x) for a, b in zip(unstack(stacked), tasks, strict=True))


def test_nothing_is_no_sum_and_an_unknown_way_is_refused():
    gradient, meta, _ = setting()
    with pytest.raises(ValueError, match="over no tasks"):
        om.over_tasks(gradient)(meta, [])
    with pytest.raises(ValueError, match="did you mean 'compiled'"):
        om.over_tasks(gradient, "compile")


def test_a_digest_tells_programs_apart_and_is_the_same_in_another_process():
    def digest(**changes):
        gradient, meta, task = setting(**changes)
        part = next(iter([task(0), task(1)]))
        given = stack(_part([part, task(1)]), 2, next(iter(meta.weights.values())))
        return trace(vmapped(gradient), meta, *given).digest

    here = digest()
    assert here == digest()
    assert len({here, digest(lr=0.2), digest(steps=3), digest(dtype=torch.float32), digest(name="layer_norm")}) == 5
    code = "import tests.numerics.test_paths as t; print(t.digest_of_the_first())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    torch.set_num_threads(1)
    assert told.strip() == digest_of_the_first()


def digest_of_the_first():
    torch.set_num_threads(1)
    gradient, meta, task = setting()
    return trace(
        vmapped(gradient), meta, *stack(_part([task(0), task(1)]), 2, next(iter(meta.weights.values())))
    ).digest


def _part(tasks):
    return Group(signature_of(tasks[0]), tasks, [1.0] * len(tasks))


def test_a_constant_of_the_model_is_part_of_the_digest():
    def digest(constant):
        class Shifted(torch.nn.Linear):
            def __init__(self):
                super().__init__(4, 2)
                self.register_buffer("shift", torch.full((2,), constant))

            def forward(self, x):
                return super().forward(x) + self.shift

        torch.manual_seed(0)
        module = Shifted().double()
        inner = om.Inner(om.model_loss(module, "mse"), om.rules.sgd(), 1)
        meta = inner.init(dict(module.named_parameters()))
        _, _, task = setting()
        given = stack(_part([task(0), task(1)]), 2, next(iter(meta.weights.values())))
        return trace(vmapped(om.exact(inner)), meta, *given).digest

    assert digest(1.0) == digest(1.0)
    assert digest(1.0) != digest(2.0)


def test_the_fastest_that_is_right_is_chosen_and_the_wrong_is_refused():
    gradient, meta, task = setting(dtype=torch.float32)
    tasks = [task(k) for k in range(6)]
    choice = choose_plan(gradient, meta, tasks, 6, None)
    assert [way.plan.batching for way in choice.measured] == ["loop", "vmap", "traced"]
    assert all(way.rejection is None and way.error < 1e-4 for way in choice.measured)
    assert choice.plan == min(choice.measured, key=lambda way: way.seconds).plan
    path = ExecutionPlan("compiled", 6, signature_of(tasks[0]), "a wrong one")

    def wrong(factor):
        def stacked_sum(*given):
            found = vmapped(gradient)(*given)
            weights = {name: grad * factor for name, grad in found.grads.weights.items()}
            return om.MetaGrad(found.loss, om.Meta(weights, {}))

        return benchmark_plan(choice.benchmark, path, stacked_sum).rejection

    assert wrong(1.0) is None
    assert "above the limit" in wrong(1.003)  # as far off as a compiled batch normalisation has been
    assert "nan" in wrong(float("nan"))


class Looks(torch.nn.Linear):
    """Decides by the value of a tensor, which no program can."""

    def forward(self, x):
        return super().forward(x) if x.sum().item() > 1e9 else super().forward(x).sin()


def test_a_model_that_cannot_be_stacked_goes_task_by_task_and_says_why():
    module = Looks(4, 2).double()
    gradient = om.exact(om.Inner(om.model_loss(module, "mse"), om.rules.sgd(), 1))
    _, _, task = setting()
    meta = om.Meta({n: w.detach() for n, w in module.named_parameters()}, {})
    choice = choose_plan(gradient, meta, [task(0), task(1)], 2, None)
    assert choice.plan.batching == "loop"
    assert "item()" in choice.measured[1].rejection
    same(om.over_tasks(gradient)(meta, [task(0), task(1)]), loop(gradient, meta, [task(0), task(1)], [0.5, 0.5]))


def test_a_memory_limit_is_obeyed_by_cutting():
    gradient, meta, task = setting("conv_group_norm")
    tasks = [task(k) for k in range(12)]
    whole = peak_bytes(lambda: om.over_tasks(gradient, "vmap")(meta, tasks))
    right = om.over_tasks(gradient, "loop")(meta, tasks)
    for share in (0.6, 0.3):
        limit = int(whole * share)
        size = fit_task_count(gradient, meta, tasks[0], 12, limit)
        assert 1 < size < 12
        cut = om.over_tasks(gradient, "vmap", memory_limit=limit)
        same(cut(meta, tasks), right)
        assert peak_bytes(lambda cut=cut: cut(meta, tasks)) <= limit
    assert fit_task_count(gradient, meta, tasks[0], 12, whole * 2) == 12
    assert fit_task_count(gradient, meta, tasks[0], 12, 10) == 0
    assert choose_plan(gradient, meta, tasks[:2], 12, 10).plan.batching == "loop"


def test_ways_that_are_cut_are_tried_as_they_are_cut():
    gradient, meta, task = setting("conv_group_norm")
    tasks = [task(k) for k in range(8)]
    limit = int(0.4 * peak_bytes(lambda: om.over_tasks(gradient, "vmap")(meta, tasks)))
    choice = choose_plan(gradient, meta, tasks, 8, limit)
    assert [way.plan.batching for way in choice.measured] == ["loop", "vmap", "traced"]
    assert all(way.rejection is None for way in choice.measured)
    assert len(choice.benchmark.group.tasks) == choice.measured[1].plan.tasks < 8


def test_a_compiled_program_takes_over_once_it_is_there(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    gradient, meta, task = setting(dtype=torch.float32)
    tasks = [task(k) for k in range(6)]
    total = TaskSum(gradient)
    tuner = Autotuner(total, 6, folder=tmp_path, measure_after=0.0)
    (before,) = tuner.find(meta, tasks)
    assert before.batching in ("vmap", "traced")
    tuner.wait()
    (after,) = tuner.find(meta, tasks)
    assert after.batching == "compiled"
    total.follow([after])
    same(total(meta, tasks, [1.0] * 6), loop(gradient, meta, tasks, [1.0] * 6), 1e-4)
    assert "compiling a program of" in caplog.text
    other = Autotuner(TaskSum(gradient), 6, folder=tmp_path, compiles=False, measure_after=0.0)
    assert other.find(meta, tasks) == (after,), "a process that leaves compiling to others takes what they made"


def test_nothing_is_measured_for_work_that_is_soon_over(tmp_path):
    gradient, meta, task = setting()
    tuner = Autotuner(TaskSum(gradient), 2, folder=tmp_path)
    assert tuner.find(meta, [task(0), task(1)]) == ()
    assert not list(tmp_path.iterdir())


def test_a_compiler_that_fails_is_told_and_the_work_goes_on(tmp_path, monkeypatch, caplog):
    gradient, meta, task = setting(dtype=torch.float32, steps=0)
    tasks = [task(k) for k in range(3)]
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    tuner = Autotuner(TaskSum(gradient), 3, folder=tmp_path, measure_after=0.0)
    (before,) = tuner.find(meta, tasks)
    tuner.wait()
    assert tuner.find(meta, tasks) == (before,)
    assert f"keeping batching mode {before.batching}" in caplog.text


def test_a_program_too_large_to_compile_is_not_traced(monkeypatch):
    monkeypatch.setattr("online_meta.batching.autotune.MAX_OPERATIONS", 10)
    gradient, meta, task = setting()
    assert MAX_OPERATIONS > 10
    choice = choose_plan(gradient, meta, [task(0), task(1)], 2, None)
    assert [way.plan.batching for way in choice.measured] == ["loop", "vmap"]
    assert choice.traced is None


def test_what_is_computed_twice_is_computed_once_in_a_program():
    """Going back, a step is computed again; yet the program of the whole is that of the unrolled loop."""
    gradient, meta, task = setting(steps=4)
    given = problem("mlp_tanh")
    loss = om.model_loss(given.module, given.loss)

    def unrolled(meta, task):
        def leader_likelihood(weights):
            for _ in range(4):
                grads = torch.func.grad(loss)(weights, task.support)
                weights = {name: weight - 0.1 * grads[name] for name, weight in weights.items()}
            return loss(weights, task.query)

        grads, value = torch.func.grad_and_value(leader_likelihood)(meta.weights)
        return om.MetaGrad(value, om.Meta(grads, {}))

    def products(estimator):
        stacked = stack(_part([task(0), task(1)]), 2, next(iter(meta.weights.values())))
        program = trace(vmapped(estimator), meta, *stacked)
        return sum("mm" in str(node.target) for node in program.graph.graph.nodes)

    assert products(gradient) <= products(unrolled)


def test_a_model_that_takes_long_over_a_task_is_left_to_the_loop(monkeypatch):
    monkeypatch.setattr("online_meta.batching.autotune.SLOW_SECONDS", 0.0)
    gradient, meta, task = setting()
    choice = choose_plan(gradient, meta, [task(0), task(1)], 2, None)
    assert [way.plan.batching for way in choice.measured] == ["loop"]
    assert choice.plan == ExecutionPlan("loop", 1, signature_of(task(0)))


def test_a_compilation_that_is_stopped_leaves_nothing(tmp_path):
    gradient, meta, task = setting(dtype=torch.float32)
    given = stack(_part([task(0), task(1)]), 2, next(iter(meta.weights.values())))
    traced = trace(vmapped(gradient), meta, *given)
    (tmp_path / f"{traced.digest}.77.part.pt2").write_bytes(b"of one that was killed")
    compilation = Compilation(traced, tmp_path)
    child = psutil.Process(compilation._child.pid)
    assert compilation.poll() is None
    compilation.close()
    assert not child.is_running()
    assert list(tmp_path.iterdir()) == []
