"""Time one rank: ``one_rank.py KIND STAGE STEPS``; rank 0 prints the seconds of each meta-step as JSON."""

import json
import os
import sys
import time
from contextlib import ExitStack

import torch

import online_meta as om
import trainers.engines
from online_meta import registry
from online_meta.learners.ftml import FollowTheMetaLeader
from tests.benchmarks.ranks import MARK
from tests.benchmarks.works import image_task
from trainers.distributed.process_group import join_process_group
from trainers.models import conv4
from trainers.settings import EngineSettings, MetaSettings, ModelSettings, TrainerSettings

BATCH, WAYS, SHOTS, QUERIES, SIDE = 32, 5, 1, 15, 28


def measure(kind: str, stage: int, steps: int) -> list[float]:
    """Return the seconds of each meta-step of MAML on ``BATCH`` tasks, after a warm-up."""
    torch.manual_seed(0)
    module = conv4(channels=3, size=SIDE, ways=WAYS)
    inner = om.Inner(om.model_loss(module, "cross_entropy"), om.rules.sgd(lr=0.1), 5)
    engine = EngineSettings(kind, processes=int(os.environ.get("WORLD_SIZE", "1")), zero_stage=stage)
    settings = TrainerSettings(ModelSettings("trainers.models:conv4"), meta=MetaSettings(), engine=engine)
    made = registry.load_module(trainers.engines, kind).build(settings, inner.init(dict(module.named_parameters())))
    learner = FollowTheMetaLeader(inner, om.exact(inner), made, batch=BATCH)
    tasks = [image_task(WAYS, SHOTS, QUERIES, seed, SIDE) for seed in range(BATCH)]
    for task in tasks:
        learner.score(task)
    learner.learn(*tasks)  # Warm-up.
    taken = []
    for task in tasks[:steps]:
        learner.score(task)
        began = time.perf_counter()
        learner.learn(task)
        taken.append(time.perf_counter() - began)
    return taken


if __name__ == "__main__":
    torch.set_num_threads(1)
    kind, stage, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with ExitStack() as cleanup:
        if kind != "local":
            cleanup.enter_context(join_process_group(EngineSettings(kind)))
        found = measure(kind, stage, steps)
        if os.environ.get("RANK", "0") == "0":
            print(MARK, json.dumps(found), flush=True)
    os._exit(0)
