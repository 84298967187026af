"""Compiled programs are shared, checked before they are loaded, and not compiled where that is known to be useless."""

import signal
import subprocess
import sys

import pytest
import torch
from torch import nn

import online_meta as om
from online_meta.batching import autotune, programs
from online_meta.batching.autotune import COMPILE_AFTER, MEASURE_AFTER_SECONDS, MEASURE_AFTER_TASKS, Autotuner
from online_meta.batching.compile import Compilation, CompileStopped, as_stacked_sum, compile_now, trace
from online_meta.batching.plan import Group, signature_of, stack, vmapped
from online_meta.batching.programs import CompilerBusy, Programs, find_refusal, load_program, lock_compiler
from online_meta.batching.task_sum import TaskSum, sum_in_loop
from online_meta.functional import recording
from tests.numerics.test_batching import setting
from tests.support.compiler import Compiler
from tests.support.daemon import wait_for

TASKS = 4


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    return Compiler(tmp_path, monkeypatch)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def work(name="mlp_tanh"):
    gradient, meta, task = setting(name, torch.float32, steps=1)
    return gradient, meta, [task(k) for k in range(TASKS)]


def record(gradient, meta, tasks):
    group = Group(signature_of(tasks[0]), tasks, [1.0] * len(tasks))
    return trace(vmapped(gradient), meta, *stack(group, len(tasks), next(iter(meta.weights.values()))))


def start(folder, cache, name="mlp_tanh", **options):
    """Start a run with its own folder; return its tuner and the plan that it has in the end."""
    gradient, meta, tasks = work(name)
    tuner = Autotuner(TaskSum(gradient), TASKS, folder=Programs(folder, cache), measure_after=0.0, **options)
    tuner.find(meta, tasks)
    tuner.wait()
    (plan,) = tuner.find(meta, tasks)
    return tuner, plan


def test_a_second_start_compiles_nothing(compiler, cache, tmp_path):
    _, first = start(tmp_path / "one", cache)
    assert (compiler.count, first.batching) == (1, "compiled")
    assert cache.stat().st_mode & 0o777 == 0o700
    _, second = start(tmp_path / "two", cache)
    assert second == first
    assert compiler.count == 1
    assert (tmp_path / "two" / f"{first.program}.pt2").read_bytes() == b"machine code"  # From there, replays take it.
    _, other = start(tmp_path / "three", None)
    assert (other, compiler.count) == (first, 2)


def test_a_configured_compilation_is_shared_too(compiler, cache, tmp_path):
    traced = record(*work())
    compile_now(traced, Programs(tmp_path / "one", cache))
    assert load_program(Programs(tmp_path / "two", cache), traced.digest) is not None
    assert compiler.count == 1


@pytest.mark.parametrize("change", ["content", "record", "processor"])
def test_a_program_that_is_not_what_was_compiled_is_compiled_again(
    compiler, cache, tmp_path, monkeypatch, caplog, change
):
    _, plan = start(tmp_path / "one", cache)
    if change == "content":
        (cache / f"{plan.program}.pt2").write_bytes(b"other code")
    elif change == "record":
        (cache / f"{plan.program}.json").write_text("{}")
    else:
        monkeypatch.setattr(programs, "name_processor", lambda: "another one")
    _, again = start(tmp_path / "two", cache)
    assert (again, compiler.count) == (plan, 2)
    assert (cache / f"{plan.program}.pt2").read_bytes() == b"machine code"
    assert {"content": "another hash", "record": "", "processor": "another processor"}[change] in caplog.text
    if change == "content":  # The copy in the run's own folder is checked as well.
        (tmp_path / "two" / f"{plan.program}.pt2").write_bytes(b"other code")
        (cache / f"{plan.program}.pt2").unlink()
        assert load_program(Programs(tmp_path / "two", cache), plan.program) is None
        assert (start(tmp_path / "two", cache)[1], compiler.count) == (plan, 3)


@pytest.mark.parametrize("exposure", ["mode 0755", "symbolic link", "another user", "not a folder"])
def test_a_cache_that_others_can_use_is_not_used(compiler, cache, tmp_path, monkeypatch, caplog, exposure):
    start(tmp_path / "one", cache)
    if exposure == "mode 0755":
        cache.chmod(0o755)
    elif exposure == "symbolic link":
        cache.rename(tmp_path / "elsewhere")
        cache.symlink_to(tmp_path / "elsewhere")
    elif exposure == "another user":
        monkeypatch.setattr(programs.os, "geteuid", lambda: 12345)
        assert programs.find_exposure(cache, private=True) == "belongs to another user"
        return
    else:
        cache = tmp_path / "file"
        cache.write_text("")
    _, plan = start(tmp_path / "two", cache)
    assert (plan.batching, compiler.count) == ("compiled", 2)
    if exposure != "not a folder":
        assert exposure in caplog.text
    assert "no compiled program is taken from the cache or kept there" in caplog.text


def test_a_folder_that_others_can_write_to_gets_no_program(compiler, tmp_path, caplog):
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o777)
    _, plan = start(tmp_path / "run", None)
    assert plan.batching != "compiled"
    assert "mode 0777, so that others can use it" in caplog.text
    assert compiler.count == 0


def spoil_slightly(results):
    return tuple(result * 1.003 for result in results)


@pytest.mark.parametrize(("kind", "reason"), [("wrong", "above the limit"), ("slow", " ms where ")])
def test_a_program_that_is_wrong_or_slow_is_not_compiled_again(compiler, cache, tmp_path, kind, reason):
    compiler.slow = kind == "slow"
    if kind == "wrong":
        compiler.spoil = spoil_slightly
    _, plan = start(tmp_path / "one", cache)
    assert plan.batching != "compiled"
    digest = record(*work()).digest
    assert reason in find_refusal(Programs(tmp_path / "two", cache), digest)
    compiler.spoil, compiler.slow = lambda results: results, False
    _, plan = start(tmp_path / "two", cache)
    assert (plan.batching != "compiled", compiler.count) == (True, 1)
    assert find_refusal(Programs(tmp_path / "three"), digest) is None


def test_a_compiler_that_fails_is_not_started_again_for_a_day(compiler, cache, tmp_path, monkeypatch, caplog):
    compiler.fail.touch()
    _, plan = start(tmp_path / "one", cache)
    assert (plan.batching != "compiled", compiler.count) == (True, 1)
    assert "exit code 1: no compiler" in caplog.text
    compiler.fail.unlink()
    _, plan = start(tmp_path / "two", cache)
    assert (plan.batching != "compiled", compiler.count) == (True, 1)
    monkeypatch.setattr(programs, "FAILURE_SECONDS", -1.0)
    _, plan = start(tmp_path / "three", cache)
    assert (plan.batching, compiler.count) == ("compiled", 2)


def test_a_compiler_that_is_killed_is_started_again(compiler, cache, tmp_path):
    compiler.hold.touch()
    gradient, meta, tasks = work()
    tuner = Autotuner(TaskSum(gradient), TASKS, folder=Programs(tmp_path / "one", cache), measure_after=0.0)
    tuner.find(meta, tasks)
    wait_for("it compiles", lambda: compiler.count == 1)
    tuner._compiling[1]._child.kill()
    tuner.wait()
    assert not tuner.is_compiling()
    compiler.hold.unlink()
    _, plan = start(tmp_path / "two", cache)
    assert (plan.batching, compiler.count) == ("compiled", 2)


def test_one_program_is_compiled_at_a_time(compiler, cache, tmp_path):
    """A process that waits keeps its plan; then it takes the program that another one has compiled."""
    compiler.hold.touch()
    gradient, meta, tasks = work()
    tuners = [
        Autotuner(TaskSum(gradient), TASKS, folder=Programs(tmp_path / name, cache), measure_after=0.0)
        for name in ("one", "two")
    ]
    before = [tuner.find(meta, tasks)[0] for tuner in tuners]
    assert all(tuner.is_compiling() for tuner in tuners)
    with pytest.raises(CompilerBusy):
        Compilation(record(*work("conv_group_norm")), Programs(tmp_path / "three", cache))
    wait_for("it compiles", lambda: compiler.count == 1)
    assert [tuner.find(meta, tasks)[0] for tuner in tuners] == before
    compiler.hold.unlink()
    for tuner in tuners:
        tuner.wait()
    assert {tuner.find(meta, tasks)[0].batching for tuner in tuners} == {"compiled"}
    assert compiler.count == 1


def test_what_waits_for_a_compiler_can_be_stopped(cache, tmp_path):
    lock = lock_compiler(Programs(tmp_path / "one", cache))
    left = iter([True, True])
    with pytest.raises(CompileStopped):
        compile_now(record(*work()), Programs(tmp_path / "two", cache), lambda: next(left, False))
    programs.os.close(lock)


def test_a_process_that_is_killed_frees_the_compiler(cache, tmp_path):
    code = (
        "import sys, time, pathlib\nfrom online_meta.batching.programs import *\n"
        f"lock = lock_compiler(Programs(pathlib.Path({str(tmp_path)!r}), pathlib.Path({str(cache)!r})))\n"
        "print('locked', flush=True)\ntime.sleep(1000)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(CompilerBusy):
            lock_compiler(Programs(tmp_path, cache))
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    programs.os.close(lock_compiler(Programs(tmp_path, cache)))


def test_a_shape_that_came_once_or_twice_is_not_compiled_for(compiler, cache, tmp_path):
    gradient, meta, tasks = work()
    tuner = Autotuner(TaskSum(gradient), TASKS, folder=Programs(tmp_path / "one", cache), measure_after=0.0)
    for _ in range(COMPILE_AFTER - 1):
        (plan,) = tuner.find(meta, tasks[:1])
        assert not tuner.is_compiling()
    assert plan.batching in ("vmap", "traced")
    tuner.find(meta, tasks[:1])
    tuner.wait()
    assert (tuner.find(meta, tasks[:1])[0].batching, compiler.count) == ("compiled", 1)


def test_a_program_is_recorded_after_some_tasks_and_compiled_after_some_seconds(compiler, cache, tmp_path):
    gradient, meta, tasks = work()
    total = TaskSum(gradient)
    tuner = Autotuner(total, TASKS, folder=Programs(tmp_path / "one", cache))
    total(meta, tasks, [1.0] * TASKS)
    assert total.count == TASKS
    assert tuner.find(meta, tasks) == () == tuner.find(meta, tasks, summed=MEASURE_AFTER_TASKS - 1)
    (plan,) = tuner.find(meta, tasks, summed=MEASURE_AFTER_TASKS)
    assert plan.batching in ("vmap", "traced")
    total.seconds = MEASURE_AFTER_SECONDS / 2
    tuner.find(meta, tasks)
    assert not tuner.is_compiling()
    total.seconds = MEASURE_AFTER_SECONDS
    tuner.find(meta, tasks)
    tuner.wait()
    assert compiler.count == 1
    later = Autotuner(TaskSum(gradient), TASKS, folder=Programs(tmp_path / "two", cache))
    (plan,) = later.find(meta, tasks, summed=MEASURE_AFTER_TASKS)
    assert plan.batching == "compiled", "what is compiled already is used at once"
    assert Autotuner(TaskSum(gradient), TASKS, measure_after=1e9).find(meta, tasks, summed=10**6) == ()


def test_the_cache_keeps_the_programs_that_were_used_last(compiler, cache, tmp_path, monkeypatch):
    start(tmp_path / "one", cache)
    (kept,) = cache.glob("*.pt2")
    old = cache / "old.pt2"
    old.write_bytes(b"machine code")
    (cache / "old.json").write_text("{}")
    programs.os.utime(old, (0, 0))
    monkeypatch.setattr(programs, "CACHE_BYTES", len(b"machine code"))
    kept.unlink()
    start(tmp_path / "two", cache)
    assert [*cache.glob("*.pt2")] == [kept]
    assert not (cache / "old.json").exists()


@pytest.mark.parametrize("name", ["mlp_tanh", "layer_norm", "conv_batch_norm"])
def test_a_program_is_recorded_as_make_fx_records_it(monkeypatch, name):
    """So plans that were recorded by earlier versions name the same programs."""
    found = record(*work(name))
    monkeypatch.setattr(recording, "_record_plainly", lambda *given: None)
    right = record(*work(name))
    assert found.graph.code == right.graph.code
    assert found.digest == right.digest


class Shifted(torch.nn.Linear):
    """A layer with a constant, and an operation in place, which only make_fx records."""

    def __init__(self):
        super().__init__(4, 2)
        self.register_buffer("shift", torch.tensor([0.5, 2.0]))

    def forward(self, x):
        return super().forward(x).mul_(2.0) + self.shift


def test_a_program_with_constants_is_compiled(tmp_path):
    """The compiler gets the code and the constants of a program, and exports it itself."""
    _, _, task = setting(dtype=torch.float32)
    tasks = [task(k) for k in range(2)]
    torch.manual_seed(0)
    module = Shifted()
    gradient = om.exact(om.Inner(om.model_loss(module, "mse"), om.rules.sgd(), 1))
    meta = om.Meta({name: weight.detach() for name, weight in module.named_parameters()}, {})
    traced = record(gradient, meta, tasks)
    right = traced.graph(*traced.leaves)
    found = compile_now(traced, Programs(tmp_path / "run", tmp_path / "cache"))(*traced.leaves)
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other)
    assert autotune.relative_error(found, right) < 1e-5


def check_compiled(module, rule, estimator, folder):
    """Check a compiled sum of two tasks in float64, where the order of additions cannot hide a wrong one."""
    inner = om.Inner(om.model_loss(module, "mse"), rule, 1)
    gradient, meta = estimator(inner), inner.init(dict(module.named_parameters()))
    batches = [om.Batch(torch.randn(5, 2).double(), torch.randn(5, 1).double()) for _ in range(4)]
    tasks = [om.Task(*batches[:2]), om.Task(*batches[2:])]
    group = Group(signature_of(tasks[0]), tasks, [1.0] * 2)
    given = stack(group, 2, next(iter(meta.weights.values())))
    program = compile_now(record(gradient, meta, tasks), Programs(folder / "run", folder / "cache"))
    right = sum_in_loop(gradient, meta, group)
    assert autotune.relative_error(as_stacked_sum(program)(meta, *given), right) < 1e-12


def test_compiled_second_derivatives_of_batch_normalisation_are_right(tmp_path):
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4, track_running_stats=False)
    module = nn.Sequential(nn.Linear(2, 4), norm, nn.Tanh(), nn.Linear(4, 1)).double()
    check_compiled(module, om.rules.sgd(lr=0.1), om.exact, tmp_path)


def test_a_program_that_draws_by_key_is_compiled(tmp_path):
    torch.manual_seed(0)
    check_compiled(nn.Linear(2, 1).double(), om.rules.bayes_by_gradient(log_std=-1.0), om.first_order, tmp_path)
