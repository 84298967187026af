"""Compiled programs are prepared before an update, and a run that must end abandons them on all ranks alike."""

from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from online_meta.batching import compile
from online_meta.batching.compile import CompileError, CompileStopped
from online_meta.batching.plan import ExecutionPlan, Group, signature_of, stack, vmapped
from online_meta.batching.task_sum import TaskSum
from online_meta.types import Batch, Meta, MetaGrad, Task
from tests.support.daemon import wait_for
from trainers.distributed.ranks import RankGroup
from trainers.loop.batching_plan import PlanSelector
from trainers.settings import EngineSettings

TASK = Task(Batch(torch.ones(2, 1), torch.ones(2, 1)), Batch(torch.ones(3, 1), torch.ones(3, 1)))
PLAN = ExecutionPlan("compiled", 2, signature_of(TASK), "digest")
META = Meta({"w": torch.ones(1)}, {})


class PreparingSum:
    """A task sum that counts its preparations, the first of which is stopped if ``stops`` is set."""

    def __init__(self, *, stops: bool = False) -> None:
        """Start without a plan."""
        self.stops, self.prepared = stops, 0
        self.plans: dict[str, ExecutionPlan] = {}
        self.should_continue = lambda: True

    def follow(self, plans: Any) -> None:
        self.plans = {plan.signature: plan for plan in plans}

    def example(self, task: Task) -> Task:
        return task

    def fit(self, task: Task) -> Task:
        return task

    def prepare(self, meta: Meta, tasks: list[Task]) -> None:
        self.prepared += 1
        if self.stops:
            self.stops = False
            raise CompileStopped("stopped")


def select(task_sum: PreparingSum, tmp_path: Path) -> PlanSelector:
    learner: Any = SimpleNamespace(task_sum=task_sum, engine=SimpleNamespace(meta=lambda: META))
    selector = PlanSelector({"ftml": learner}, EngineSettings(), 2, tmp_path)
    selector.follow({"ftml": (PLAN,)})
    return selector


def test_programs_are_prepared_once(tmp_path: Path) -> None:
    votes: list[bool] = []
    ranks = RankGroup(gather=lambda vote: votes.append(vote) or [vote])
    task_sum = PreparingSum()
    selector = select(task_sum, tmp_path)
    assert [selector.prepare([TASK], ranks) for _ in range(3)] == [True] * 3
    assert (task_sum.prepared, votes) == (1, [False])
    selector.follow({"ftml": (PLAN._replace(batching="vmap", program=""),)})
    assert selector.prepare([TASK], ranks)
    assert votes == [False], "nothing is compiled for this plan"


@pytest.mark.parametrize("stops", [True, False])
def test_all_ranks_leave_an_update_out_if_one_is_stopped(tmp_path: Path, stops: bool) -> None:
    others = [not stops]
    task_sum = PreparingSum(stops=stops)
    selector = select(task_sum, tmp_path)
    ranks = RankGroup(gather=lambda vote: [vote, *others])
    assert not selector.prepare([TASK], ranks)
    others[0] = False
    assert selector.prepare([TASK], ranks), "it is tried again"
    assert task_sum.prepared == 2


def test_no_plan_is_searched_for_in_a_drain(tmp_path: Path) -> None:
    selector, stop = select(PreparingSum(), tmp_path), Event()
    selector.stop_with(stop, lambda: None)
    stop.set()
    assert selector.find({"ftml": (PLAN,)}, [TASK]) == {"ftml": (PLAN,)}


def weighted(meta: Meta, task: Task) -> MetaGrad:
    return MetaGrad((task.support.x * meta.weights["w"]).sum(), Meta({"w": task.support.x.sum(0)}, {}))


WORKER = """
import os, pathlib, subprocess, sys
compiler = None if {fails} else subprocess.Popen(["sleep", "100000"])
pathlib.Path({pids!r} + ".new").write_text(f"{{os.getpid()}} {{compiler.pid if compiler else os.getpid()}}")
os.rename({pids!r} + ".new", {pids!r})
compiler.wait() if compiler else sys.exit(1)
"""


@pytest.mark.parametrize("fails", [False, True], ids=["runs", "fails"])
def test_a_stopped_compilation_ends_its_compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """A worker that fails in a drain counts as stopped: the signal may have reached it, too."""
    pids, worker = tmp_path / "pids", tmp_path / "worker.py"
    worker.write_text(WORKER.format(pids=str(pids), fails=fails))
    monkeypatch.setattr(compile, "WORKER_SCRIPT", worker)
    task_sum = TaskSum(weighted, tmp_path / "programs")
    task_sum.follow([PLAN])
    task_sum.should_continue = lambda: not pids.exists()
    with pytest.raises(CompileStopped):
        task_sum.prepare(META, [TASK])
    for pid in map(int, pids.read_text().split()):
        wait_for("it has ended", lambda pid=pid: not psutil.pid_exists(pid))
    task_sum.should_continue = lambda: True
    if fails:
        with pytest.raises(CompileError):
            task_sum.prepare(META, [TASK])


def test_recording_and_exporting_a_program_stop_between_operations(tmp_path: Path) -> None:
    """Large programs take a minute each; what is recorded afterwards is as before."""
    stacked, weights = stack(Group(PLAN.signature, [TASK, TASK], [1.0, 0.5]), 2, META.weights["w"])
    calls: list[int] = []
    program = compile.trace(vmapped(weighted), META, stacked, weights, lambda: calls.append(1) is None)
    assert len(calls) > 3
    for allowed in range(0, len(calls), 2):
        left = iter([True] * allowed)
        with pytest.raises(CompileStopped):
            compile.trace(vmapped(weighted), META, stacked, weights, lambda left=left: next(left, False))
    assert compile.trace(vmapped(weighted), META, stacked, weights).digest == program.digest
    left = iter([True] * 3)
    with pytest.raises(CompileStopped):
        compile.Compilation(program, tmp_path, lambda: next(left, False))
    assert not list(tmp_path.glob("*.log")), "no compiler was started"
    assert torch.ones(2).add(1).tolist() == [2.0, 2.0]
