"""Every way to sum meta-gradients over tasks gives the sum of a loop over single tasks."""

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
    """Return an exact estimator, meta-parameters, and a function that makes tasks."""
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
@pytest.mark.parametrize("mode", BATCHING_MODES[:3])
def test_tasks_of_several_shapes_are_grouped_cut_and_padded(mode, name):
    gradient, meta, task = setting(name)
    tasks = [task(0), task(1, 6, 3), task(2), task(3), task(4, 6, 3), task(5), task(6), task(7, 7, 7)]
    weights = [1.0, 0.5, 2.0, 0.0, 3.0, 0.25, 1.5, 0.7]
    total = TaskSum(gradient)
    # Five tasks of the first shape in threes: one spare row. Two of the second in threes: one chunk with a spare row.
    total.follow([ExecutionPlan(mode, 3, signature_of(tasks[0])), ExecutionPlan(mode, 3, signature_of(tasks[1]))])
    same(total(meta, tasks, weights), loop(gradient, meta, tasks, weights))


@pytest.mark.parametrize("mode", BATCHING_MODES[:3])
def test_the_order_of_the_names_of_weights_does_not_matter(mode):
    """A program takes tensors by position; meta-parameters from a file have their names in another order."""
    gradient, meta, task = setting()
    tasks, weights = [task(0), task(1)], [1.0, 0.5]
    total = TaskSum(gradient)
    total.follow([ExecutionPlan(mode, 2, signature_of(tasks[0]))])
    right = total(meta, tasks, weights)
    backwards = om.Meta(dict(reversed(meta.weights.items())), dict(reversed(meta.rule.items())))
    same(total(backwards, tasks, weights), right)


def test_compiled_programs_are_right_and_give_the_same_bits_when_reloaded(tmp_path):
    gradient, meta, task = setting(steps=1)
    tasks, weights = [task(k) for k in range(5)], [1.0, 2.0, 0.5, 3.0, 0.1]
    plan = ExecutionPlan("compiled", 3, signature_of(tasks[0]))
    first, again = TaskSum(gradient, tmp_path), TaskSum(gradient, tmp_path)
    first.follow([plan])
    found = first(meta, tasks, weights)
    same(found, loop(gradient, meta, tasks, weights))
    (kept,) = tmp_path.iterdir()
    made = kept.stat().st_mtime_ns
    again.follow([plan])
    repeated = again(meta, tasks, weights)
    assert kept.stat().st_mtime_ns == made, "the program was compiled twice"
    assert all(torch.equal(found.grads.weights[n], repeated.grads.weights[n]) for n in meta.weights)
    kept.unlink()  # A recompiled program gives the same bits, too.
    recompiled = TaskSum(gradient, tmp_path)
    recompiled.follow([plan])
    once_more = recompiled(meta, tasks, weights)
    assert all(torch.equal(found.grads.weights[n], once_more.grads.weights[n]) for n in meta.weights)


def test_stacked_tasks_are_accepted_as_they_are():
    gradient, meta, task = setting()
    tasks = [task(k) for k in range(4)]
    stacked = om.Task(*(om.Batch(*(torch.stack(v) for v in zip(*b, strict=True))) for b in zip(*tasks, strict=True)))
    right = om.over_tasks(gradient, "loop")(meta, tasks)
    for mode in ("auto", "loop", "vmap", "traced"):
        same(om.over_tasks(gradient, mode)(meta, stacked), right)
        same(om.over_tasks(gradient, mode)(meta, tasks), right)
    assert all(torch.equal(a.support.x, b.support.x) for a, b in zip(unstack(stacked), tasks, strict=True))


def test_no_tasks_and_an_unknown_batching_are_refused():
    gradient, meta, _ = setting()
    with pytest.raises(ValueError, match="over no tasks"):
        om.over_tasks(gradient)(meta, [])
    with pytest.raises(ValueError, match="did you mean 'compiled'"):
        om.over_tasks(gradient, "compile")


def test_a_digest_identifies_a_program_in_every_process():
    def digest(**changes):
        gradient, meta, task = setting(**changes)
        part = next(iter([task(0), task(1)]))
        given = stack(make_group([part, task(1)]), 2, next(iter(meta.weights.values())))
        return trace(vmapped(gradient), meta, *given).digest

    here = digest()
    assert here == digest()
    assert len({here, digest(lr=0.2), digest(steps=3), digest(dtype=torch.float32), digest(name="layer_norm")}) == 5
    code = "import tests.numerics.test_batching as t; print(t.digest_of_the_default())"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    torch.set_num_threads(1)
    assert output.strip() == digest_of_the_default()


def digest_of_the_default():
    torch.set_num_threads(1)
    gradient, meta, task = setting()
    return trace(
        vmapped(gradient), meta, *stack(make_group([task(0), task(1)]), 2, next(iter(meta.weights.values())))
    ).digest


def make_group(tasks):
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
        given = stack(make_group([task(0), task(1)]), 2, next(iter(meta.weights.values())))
        return trace(vmapped(om.exact(inner)), meta, *given).digest

    assert digest(1.0) == digest(1.0)
    assert digest(1.0) != digest(2.0)


def test_the_fastest_right_plan_is_chosen_and_a_wrong_one_is_rejected():
    gradient, meta, task = setting(dtype=torch.float32)
    tasks = [task(k) for k in range(6)]
    choice = choose_plan(gradient, meta, tasks, 6, None)
    assert [benchmark.plan.batching for benchmark in choice.measured] == ["loop", "vmap", "traced"]
    assert all(benchmark.rejection is None and benchmark.error < 1e-4 for benchmark in choice.measured)
    assert choice.plan == min(choice.measured, key=lambda benchmark: benchmark.seconds).plan
    plan = ExecutionPlan("compiled", 6, signature_of(tasks[0]), "a wrong one")

    def rejection_of(factor):
        def stacked_sum(*given):
            found = vmapped(gradient)(*given)
            weights = {name: grad * factor for name, grad in found.grads.weights.items()}
            return om.MetaGrad(found.loss, om.Meta(weights, {}))

        return benchmark_plan(choice.benchmark, plan, stacked_sum).rejection

    assert rejection_of(1.0) is None
    assert "above the limit" in rejection_of(1.003)  # the size of an error that a compiled batch normalisation had
    assert "nan" in rejection_of(float("nan"))


def test_a_program_is_judged_right_after_the_meta_parameters_have_moved():
    gradient, meta, task = setting(dtype=torch.float32)
    choice = choose_plan(gradient, meta, [task(k) for k in range(4)], 4, None)
    for value in meta.weights.values():
        value.data.mul_(1.5)  # as the optimizer does while a program is compiled
    assert benchmark_plan(choice.benchmark, choice.plan, vmapped(gradient)).rejection is None


class ValueDependent(torch.nn.Linear):
    """Decides by the value of a tensor, which a traced program cannot do."""

    def forward(self, x):
        return super().forward(x) if x.sum().item() > 1e9 else super().forward(x).sin()


def test_a_model_that_cannot_be_stacked_runs_task_by_task_and_reports_why():
    module = ValueDependent(4, 2).double()
    gradient = om.exact(om.Inner(om.model_loss(module, "mse"), om.rules.sgd(), 1))
    _, _, task = setting()
    meta = om.Meta({n: w.detach() for n, w in module.named_parameters()}, {})
    choice = choose_plan(gradient, meta, [task(0), task(1)], 2, None)
    assert choice.plan.batching == "loop"
    assert "item()" in choice.measured[1].rejection
    same(om.over_tasks(gradient)(meta, [task(0), task(1)]), loop(gradient, meta, [task(0), task(1)], [0.5, 0.5]))


def test_a_memory_limit_is_met_by_smaller_chunks():
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


def test_plans_in_chunks_are_benchmarked_in_chunks():
    gradient, meta, task = setting("conv_group_norm")
    tasks = [task(k) for k in range(8)]
    limit = int(0.4 * peak_bytes(lambda: om.over_tasks(gradient, "vmap")(meta, tasks)))
    choice = choose_plan(gradient, meta, tasks, 8, limit)
    assert [benchmark.plan.batching for benchmark in choice.measured] == ["loop", "vmap", "traced"]
    assert all(benchmark.rejection is None for benchmark in choice.measured)
    assert len(choice.benchmark.group.tasks) == choice.measured[1].plan.tasks < 8


def test_a_compiled_program_is_used_once_it_is_ready(tmp_path, caplog):
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
    assert other.find(meta, tasks) == (after,), "a process that does not compile uses the programs of others"


def test_short_work_is_not_benchmarked(tmp_path):
    gradient, meta, task = setting()
    tuner = Autotuner(TaskSum(gradient), 2, folder=tmp_path)
    assert tuner.find(meta, [task(0), task(1)]) == ()
    assert not list(tmp_path.iterdir())


def test_a_failing_compiler_is_reported_and_work_continues(tmp_path, monkeypatch, caplog):
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
    assert [benchmark.plan.batching for benchmark in choice.measured] == ["loop", "vmap"]
    assert choice.traced is None


def test_a_program_computes_repeated_work_once():
    """The backward pass recomputes each step; a traced program still has no more products than the unrolled loop."""
    gradient, meta, task = setting(steps=4)
    given = problem("mlp_tanh")
    loss = om.model_loss(given.module, given.loss)

    def unrolled(meta, task):
        def adapted_loss(weights):
            for _ in range(4):
                grads = torch.func.grad(loss)(weights, task.support)
                weights = {name: weight - 0.1 * grads[name] for name, weight in weights.items()}
            return loss(weights, task.query)

        grads, value = torch.func.grad_and_value(adapted_loss)(meta.weights)
        return om.MetaGrad(value, om.Meta(grads, {}))

    def products(estimator):
        stacked = stack(make_group([task(0), task(1)]), 2, next(iter(meta.weights.values())))
        program = trace(vmapped(estimator), meta, *stacked)
        return sum("mm" in str(node.target) for node in program.graph.graph.nodes)

    assert products(gradient) <= products(unrolled)


def test_a_model_that_is_slow_on_one_task_uses_the_loop(monkeypatch):
    monkeypatch.setattr("online_meta.batching.autotune.SLOW_SECONDS", 0.0)
    gradient, meta, task = setting()
    choice = choose_plan(gradient, meta, [task(0), task(1)], 2, None)
    assert [benchmark.plan.batching for benchmark in choice.measured] == ["loop"]
    assert choice.plan == ExecutionPlan("loop", 1, signature_of(task(0)))


def test_a_stopped_compilation_leaves_no_file(tmp_path):
    gradient, meta, task = setting(dtype=torch.float32)
    given = stack(make_group([task(0), task(1)]), 2, next(iter(meta.weights.values())))
    traced = trace(vmapped(gradient), meta, *given)
    (tmp_path / f"{traced.digest}.77.part.pt2").write_bytes(b"of a killed compilation")
    compilation = Compilation(traced, tmp_path)
    child = psutil.Process(compilation._child.pid)
    assert compilation.poll() is None
    compilation.close()
    assert not child.is_running()
    assert list(tmp_path.iterdir()) == []
