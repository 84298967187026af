"""The peak of one rank in a process of its own: ``memory_child.py NETWORK STEPS SAVING ENGINE STAGE``.

Prints the resident bytes that two rounds of learning add at their peak, and what was estimated, as JSON. The allocator
is told to give back what is freed; Linux alone can reset the peak (``clear_refs``, proc(5)).
"""

import ctypes
import gc
import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

import trainers.engines
from online_meta import registry
from online_meta.learners.ftml import FollowTheMetaLeader
from online_meta.types import Task
from tests.benchmarks.resident import kilobytes
from tests.benchmarks.works import image_task, sequence_task
from trainers.build import build_gradient, build_inner, build_loss, build_module
from trainers.distributed.process_group import join_process_group
from trainers.memory_estimate import estimate_memory
from trainers.settings import EngineSettings, InnerSettings, MetaSettings, ModelSettings, TrainerSettings

NETWORKS = {
    "transformer": ModelSettings(
        "trainers.models:transformer",
        {"outputs": 1, "length": 64, "features": 16, "width": 128, "heads": 4, "layers": 4},
        "mse",
    ),
    "conv4": ModelSettings(
        "trainers.models:conv4", {"channels": 3, "size": 42, "ways": 5, "filters": 48, "norm": "batch", "pool": "max"}
    ),
}
BLOCKS = {"transformer": ("body.*",), "conv4": ("body",)}
SAVINGS = {"plain": (), "rematerialised": ("rematerialise",), "recomputed": ("recompute",)}
SAVINGS["both"] = (*SAVINGS["rematerialised"], *SAVINGS["recomputed"])
SMALL = {"transformer": {"width": 16, "layers": 1}, "conv4": {"filters": 4, "size": 16}}


def settings_of(network: str, steps: int, saving: str, kind: str, stage: int) -> TrainerSettings:
    """Return what a case is configured with."""
    chosen = SAVINGS[saving]
    return TrainerSettings(
        replace(NETWORKS[network], recompute=BLOCKS[network] if "recompute" in chosen else ()),
        InnerSettings(steps=steps, lr=0.01),
        MetaSettings(options={"rematerialise": True} if "rematerialise" in chosen else {}, batch=2),
        engine=EngineSettings(kind, zero_stage=stage, batching="loop"),
    )


def tasks_of(network: str, side: int = 42) -> list[Task]:
    """Return two tasks: a few samples, with which the optimizer's state comes to be, and then as many as are told of.

    These are ten sequences to adapt on and ten to be judged on, or 5-way 1-shot with 5 query images a class.
    """
    if network == "transformer":
        return [sequence_task(size, 64, 16, seed) for seed, size in enumerate((1, 10))]
    return [image_task(5, 1, evaluation_loss, seed, side) for seed, evaluation_loss in enumerate((1, 5))]


def learn(settings: TrainerSettings, tasks: list[Task]) -> Callable[[], int]:
    """Learn the tasks, a round each, as a rank does; return what estimates the peak."""
    module = build_module(settings.model, 0)
    inner = build_inner(settings.inner, build_loss(settings.model, module))
    start = inner.init(dict(module.named_parameters()))
    del module
    engine = registry.load_module(trainers.engines, settings.engine.kind).build(settings, start)
    learner = FollowTheMetaLeader(inner, build_gradient(settings.meta, inner), engine, batch=2)
    for task in tasks:
        learner.score(task)
        learner.learn(task)
    return lambda: estimate_memory(settings, inner, start, tasks[-1]).peak


def main(network: str, steps: int, saving: str, kind: str, stage: int) -> None:
    """Warm up by a small network of the kind, then measure."""
    torch.set_num_threads(1)
    settings = settings_of(network, steps, saving, kind, stage)
    small = replace(settings.model, args={**settings.model.args, **SMALL[network]})
    with ExitStack() as cleanup:
        if kind != "local":
            cleanup.enter_context(join_process_group(settings.engine))
        tasks = tasks_of(network)
        learn(replace(settings, model=small), tasks_of(network, 16))
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = kilobytes("VmRSS")
        told = learn(settings, tasks)
        measured = 1024 * (kilobytes("VmHWM") - before)
        print("PEAK", json.dumps({"measured": measured, "estimate": told()}), flush=True)
    os._exit(0)  # DeepSpeed's threads are not waited for.


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5]))
