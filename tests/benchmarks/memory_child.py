"""Measure the peak of one rank in a separate process: ``memory_child.py NETWORK STEPS SAVING ENGINE STAGE``.

Prints the resident bytes that two rounds of learning add at their peak, and the estimate, as JSON. The allocator is
configured to return freed memory. Only Linux can reset the peak (``clear_refs``, proc(5)).
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
from tests.benchmarks.resident import read_kilobytes
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


def make_settings(network: str, steps: int, saving: str, kind: str, stage: int) -> TrainerSettings:
    """Return the settings of a case."""
    chosen = SAVINGS[saving]
    return TrainerSettings(
        replace(NETWORKS[network], recompute=BLOCKS[network] if "recompute" in chosen else ()),
        InnerSettings(steps=steps, lr=0.01),
        MetaSettings(options={"rematerialise": True} if "rematerialise" in chosen else {}, batch=2),
        engine=EngineSettings(kind, zero_stage=stage, batching="loop"),
    )


def make_tasks(network: str, side: int = 42) -> list[Task]:
    """Return a small task, with which the optimizer creates its state, and the task that is measured.

    The latter has ten support and ten query sequences, or 5-way 1-shot images with 5 query images per class.
    """
    if network == "transformer":
        return [sequence_task(size, 64, 16, seed) for seed, size in enumerate((1, 10))]
    return [image_task(5, 1, queries, seed, side) for seed, queries in enumerate((1, 5))]


def learn(settings: TrainerSettings, tasks: list[Task]) -> Callable[[], int]:
    """Learn the tasks as a rank does, one per round; return a function that estimates the peak."""
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
    """Warm up with a small network of the same type, then measure."""
    torch.set_num_threads(1)
    settings = make_settings(network, steps, saving, kind, stage)
    small = replace(settings.model, args={**settings.model.args, **SMALL[network]})
    with ExitStack() as cleanup:
        if kind != "local":
            cleanup.enter_context(join_process_group(settings.engine))
        tasks = make_tasks(network)
        learn(replace(settings, model=small), make_tasks(network, 16))
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = read_kilobytes("VmRSS")
        estimate = learn(settings, tasks)
        measured = 1024 * (read_kilobytes("VmHWM") - before)
        print("PEAK", json.dumps({"measured": measured, "estimate": estimate()}), flush=True)
    os._exit(0)  # Do not wait for DeepSpeed's threads.


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5]))
