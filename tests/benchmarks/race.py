"""Run a race: check every contestant on the same workload, then let them take turns, round by round."""

import gc
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from torch.utils._pytree import tree_map

import online_meta as om
from online_meta.testing.oracle import unrolled_maml
from online_meta.tree import to_float64
from online_meta.types import MetaGrad, Params, Task
from tests.benchmarks.racers import Racer, start_racer
from tests.benchmarks.resident import measure_resident_bytes
from tests.benchmarks.works import Work
from tests.numerics.meter import MemoryMeter

LEEWAY = 30
Log = Callable[[str], None]


def race(work: Work, rounds: int, programs: Path, log: Log) -> dict[str, Any]:
    """Return the rows of a workload; that of a failed contestant has the reason instead of figures."""
    weights, tasks = work.weights(), [work.task(seed) for seed in range(work.timed)]
    log("float64 reference")
    right = compute_reference(work, weights, tasks)
    failed, racers = {}, []
    with ExitStack() as stack:
        for name in work.contestants:
            log(name)
            try:
                racer = start_racer(name, work, weights, tasks, programs, stack)
                racer.calibrate(right)
                racers.append(racer)
            except Exception as error:  # An error of one contestant does not stop the others.
                failed[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        for number in range(rounds):
            log(f"round {number + 1} of {rounds}")
            gc.collect()
            for k in range(len(racers)):
                racer = racers[(k + number) % len(racers)]
                racer.turns.append(racer.turn(racer.calls))
        log("memory")
        rows = [make_row(racer, work, programs) for racer in racers]
    rows += [{"contestant": name, "failed": reason} for name, reason in failed.items()]
    mark_wrong(rows)
    goals = [goal._asdict() for goal in work.goals]
    scale = work.tasks / work.timed
    return {"title": work.title, "tasks": work.tasks, "timed": work.timed, "scale": scale, "rows": rows, "goals": goals}


def compute_reference(work: Work, weights: Params, tasks: list[Task]) -> MetaGrad:
    """Return the mean meta-gradient in float64: unrolled, or with the package's adjoint if that is too large."""
    module, inner = work.module().double(), om.rules.sgd(lr=work.lr)
    weights, tasks = to_float64((weights, tasks))
    if work.reference == "adjoint":
        exact = om.Inner(om.model_loss(module, work.loss), inner, work.steps)
        return om.over_tasks(om.exact(exact), "loop")(exact.init(weights), tasks)
    each = [unrolled_maml(module, work.loss, weights, task, lr=work.lr, steps=work.steps) for task in tasks]
    return tree_map(lambda *leaves: sum(leaves) / len(leaves), *each)


def make_row(racer: Racer, work: Work, programs: Path) -> dict[str, Any]:
    """Return the figures of a contestant; seconds are scaled to all ``work.tasks`` tasks."""
    scale = work.tasks / work.timed
    middle, spread = describe_spread(racer.turns)
    used, by = measure_memory(racer, work, programs)
    return {
        "contestant": racer.name,
        "seconds": middle * scale,
        "spread": spread,
        "raw": racer.turns,
        "calls": racer.calls,
        "first_call": racer.first,
        "compiling": racer.first - middle if racer.compiles else racer.compiling,
        "error": racer.error,
        "bytes": used,
        "bytes_by": by,
    }


def describe_spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the median of ``values``, and the interquartile range divided by it."""
    middle = median(values)
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (middle,) * 3
    return middle, (high - low) / middle


def measure_memory(racer: Racer, work: Work, programs: Path) -> tuple[int | None, str]:
    """Return the bytes that a call adds, and how they were measured."""
    if racer.call is None:
        return racer.bytes, "XLA's own account"
    if racer.name.endswith("compiled"):
        return measure_resident_bytes(work.name, racer.name, programs), "resident pages of a fresh process"
    gc.collect()
    with MemoryMeter() as meter:
        racer.call()
    return meter.peak, "live tensors"


def mark_wrong(rows: list[dict[str, Any]]) -> None:
    """Mark rows whose error exceeds both 1e-4 and ``LEEWAY`` times that of the unrolled loop.

    At a kink (ReLU, max-pooling), rounding decides between two sides, and the gradient jumps, so the errors of correct
    libraries may differ by this factor. A missing step or term causes a larger error.
    """
    errors = {row["contestant"]: row["error"] for row in rows if "failed" not in row}
    allowed = max(1e-4, LEEWAY * errors.get("unrolled", 0.0))
    for row in rows:
        if "failed" not in row and not row["error"] <= allowed:
            row["failed"] = f"wrong: its error is {row['error']:.1e}; the limit is {allowed:.1e}"
