"""Runs of a transformer whose frozen weights lie in a file, and the pages of the file that a process holds."""

import os
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import online_meta as om
from online_meta.functional.stateless import KeptWeights
from online_meta.learners import MemoryReplayBuffer
from online_meta.types import Score
from tests.support.runs import SETTINGS
from trainers.build import build_context, build_engine, build_learners
from trainers.settings import (
    EngineSettings,
    InnerSettings,
    MetaSettings,
    ModelSettings,
    RegretSettings,
    TrainerSettings,
)

LENGTH, FEATURES, WIDTH = 4, 3, 128
ARGS = {"outputs": 1, "length": LENGTH, "features": FEATURES, "width": WIDTH, "heads": 2, "layers": 4}
LOW_RANK = {"build": "trainers.models:transformer", "args": ARGS, "layers": ["body.*"], "rank": 2, "freeze": True}
MODEL = ModelSettings("trainers.models:lora", {**LOW_RANK, "learned": ["head.*"]}, "mse", recompute=("body.*",))


def frozen_settings(folder: str | Path, model: ModelSettings = MODEL, **engine: object) -> TrainerSettings:
    """Return settings of a run that keeps frozen weights in a folder; "" for none."""
    return replace(
        SETTINGS,
        model=model,
        inner=InnerSettings(steps=2, lr=0.1, fast=("*lora*",), answer_heads=("ridge_head",)),
        meta=MetaSettings(batch=3, lr=0.01),
        regret=RegretSettings(baselines=()),
        engine=EngineSettings(batching="loop", frozen_folder=str(folder), **engine),
    )


def frozen_task(seed: int) -> om.Task:
    """Return a task of two short sequences each."""
    random = torch.Generator().manual_seed(seed)

    def batch() -> om.Batch:
        return om.Batch(torch.randn(2, LENGTH, FEATURES, generator=random), torch.randn(2, 1, generator=random))

    return om.Task(batch(), batch())


def play_frozen(settings: TrainerSettings, rounds: int = 2) -> tuple[list[Score], dict[str, Tensor]]:
    """Return the scores of the leading learner of a run, and its final state."""
    context = build_context(settings, MemoryReplayBuffer(), engine=settings.engine.kind)
    (learner,) = build_learners(settings, context, partial(build_engine, kind=settings.engine.kind)).values()
    scores = []
    for round in range(rounds):
        task = frozen_task(round)
        context.buffer.add(round, task)
        scores.append(learner.score(task))
        learner.learn(task)
    return scores, learner.save()


def read_resident_share(file: Path) -> float:
    """Return the share of a mapped file that is in the memory of this process; see smaps in proc(5)."""
    found = re.findall(rf"{re.escape(str(file))}\n(?:\w+:.*\n)*?Rss: +(\d+) kB", Path("/proc/self/smaps").read_text())
    assert found, f"{file} is not mapped"
    return 1024 * sum(map(int, found)) / os.path.getsize(file)


def watch_residence(kept: KeptWeights, file: Path, shares: list[float], *, drop: bool = True) -> KeptWeights:
    """Return the same weights; note the resident share whenever some are released, which happens only if ``drop``."""

    def release(names):
        shares.append(read_resident_share(file))
        if drop:
            kept.release(names)

    return kept._replace(release=release)
