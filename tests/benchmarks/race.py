"""One race: every contestant on the same work, checked first, then called in turn, round by round."""

import gc
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from torch.utils._pytree import tree_map

import online_meta as om
from online_meta.testing.oracle import unrolled_maml
from online_meta.tree import to_float64
from online_meta.types import MetaGrad, Params, Task
from tests.benchmarks.racers import Racer, enter
from tests.benchmarks.resident import resident_bytes
from tests.benchmarks.works import Work
from tests.numerics.meter import MemoryMeter

LEEWAY = 30
Say = Callable[[str], None]


def race(work: Work, rounds: int, programs: Path, say: Say) -> dict[str, Any]:
    """Return the work's rows, a failed contestant's with the reason instead of figures."""
    weights, tasks = work.weights(), [work.task(seed) for seed in range(work.timed)]
    say("float64 reference")
    right = reference(work, weights, tasks)
    failed, racers = {}, []
    with ExitStack() as stack:
        for name in work.contestants:
            say(name)
            try:
                racer = enter(name, work, weights, tasks, programs, stack)
                racer.settle(right)
                racers.append(racer)
            except Exception as error:  # Whatever stops one contestant, the others run.
                failed[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            gc.collect()
            for k in range(len(racers)):
                racer = racers[(k + number) % len(racers)]
                racer.turns.append(racer.turn(racer.calls))
        say("memory")
        rows = [row(racer, work, programs) for racer in racers]
    rows += [{"contestant": name, "failed": reason} for name, reason in failed.items()]
    judge(rows)
    goals = [goal._asdict() for goal in work.goals]
    scale = work.tasks / work.timed
    return {"title": work.title, "tasks": work.tasks, "timed": work.timed, "scale": scale, "rows": rows, "goals": goals}


def reference(work: Work, weights: Params, tasks: list[Task]) -> MetaGrad:
    """Return the mean meta-gradient in float64: unrolled, or by the package's adjoint where that is too large."""
    module, inner = work.module().double(), om.rules.sgd(lr=work.lr)
    weights, tasks = to_float64((weights, tasks))
    if work.reference == "adjoint":
        exact = om.Inner(om.model_loss(module, work.loss), inner, work.steps)
        return om.over_tasks(om.exact(exact), "loop")(exact.init(weights), tasks)
    each = [unrolled_maml(module, work.loss, weights, task, lr=work.lr, steps=work.steps) for task in tasks]
    return tree_map(lambda *leaves: sum(leaves) / len(leaves), *each)


def row(racer: Racer, work: Work, programs: Path) -> dict[str, Any]:
    """Return a contestant's figures; seconds are of all ``work.tasks`` tasks."""
    scale = work.tasks / work.timed
    middle = median(racer.turns)
    low, _, high = quantiles(racer.turns, n=4, method="inclusive") if len(racer.turns) > 1 else (middle,) * 3
    used, by = memory(racer, work, programs)
    return {
        "contestant": racer.name,
        "seconds": middle * scale,
        "spread": (high - low) / middle,
        "raw": racer.turns,
        "calls": racer.calls,
        "first_call": racer.first,
        "compiling": racer.first - middle if racer.compiles else racer.compiling,
        "error": racer.error,
        "bytes": used,
        "bytes_by": by,
    }


def memory(racer: Racer, work: Work, programs: Path) -> tuple[int | None, str]:
    """Return the bytes that a call takes above what lives before it, and how that was found out."""
    if racer.call is None:
        return racer.bytes, "XLA's own account"
    if racer.name.endswith("compiled"):
        return resident_bytes(work.name, racer.name, programs), "resident pages of a fresh process"
    gc.collect()
    with MemoryMeter() as meter:
        racer.call()
    return meter.peak, "live tensors"


def judge(rows: list[dict[str, Any]]) -> None:
    """Mark what is wrong: an error beyond 1e-4 and ``LEEWAY`` times that of the unrolled loop.

    Where a value lies at a kink (ReLU, max-pooling), rounding decides on which side, and the gradient jumps: the
    sums of one library may be that much less exact than another's. A missing step or term is off by more.
    """
    errors = {row["contestant"]: row["error"] for row in rows if "failed" not in row}
    allowed = max(1e-4, LEEWAY * errors.get("unrolled", 0.0))
    for row in rows:
        if "failed" not in row and not row["error"] <= allowed:
            row["failed"] = f"wrong: its error is {row['error']:.1e}, and {allowed:.1e} is allowed"
