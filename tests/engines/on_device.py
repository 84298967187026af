"""Compare one rank at every ZeRO stage on a device with one process: ``on_device.py DEVICE [CASE ...]``.

Prints a line of JSON per check. ``python -m tests.engines.on_device cuda`` checks NCCL and a GPU; the test suite uses
cpu.
"""

import itertools
import json
import os
import sys
from functools import partial

import torch
from torch.utils._pytree import tree_map

import online_meta as om
import trainers.engines.deepspeed
import trainers.engines.local
from online_meta.learners.ftml import FollowTheMetaLeader, build
from online_meta.testing.learner_problems import STEPS, net, setup, stream, weights_of
from tests.engines.cases import BATCH, CASES, ROUNDS, STEPS_PER_ROUND, Case, settings, single
from trainers.distributed.process_group import join_process_group
from trainers.settings import EngineSettings

NEAR = 1e-5
PLACES = [*((stage, False) for stage in range(4)), *((stage, True) for stage in (1, 2, 3))]
"""ZeRO stages, and whether the optimizer's state is kept in host memory."""


def learner(case: Case, engine, device: str) -> FollowTheMetaLeader:
    """Return a learner like that of ``cases``, on a device."""
    module = net().float().to(device)
    inner = om.Inner(om.model_loss(module, "mse"), getattr(om.rules, case.rule)(lr=0.05), STEPS)
    return build(
        setup(
            inner=inner,
            gradient=getattr(om, case.gradient)(inner),
            engine=engine,
            start=inner.init(weights_of(module)),
            batch=BATCH,
            steps_per_round=STEPS_PER_ROUND,
        )
    )


def play(one: FollowTheMetaLeader, device: str, rounds: range = range(ROUNDS)) -> None:
    for task in [tree_map(lambda leaf: leaf.to(device), single(task)) for task in stream(rounds.stop)][rounds.start :]:
        one.score(task)
        one.learn(task)


def error(found: om.Params, right: om.Params) -> float:
    """Return the largest error of any tensor of a state, relative to its largest entry."""
    assert found.keys() == right.keys(), (sorted(found), sorted(right))
    return max(float((found[n] - w).abs().max() / w.abs().max().clamp(min=1e-30)) for n, w in right.items())


def check(name: str, stage: int, offload: bool, device: str) -> dict[str, object]:
    """Return an engine's error on the device against one process on the CPU, and a resumed engine's against it."""
    case = CASES[name]
    alone = learner(case, partial(trainers.engines.local.build, settings(case, "local")), "cpu")
    play(alone, "cpu")
    made = settings(case, "deepspeed", zero_stage=stage, offload_optimizer=offload, device=device)
    one, other = (learner(case, partial(trainers.engines.deepspeed.build, made), device) for _ in range(2))
    half = range(ROUNDS // 2)
    play(one, device, half)
    other.load(one.save(), len(half))
    for round, task in enumerate(stream(len(half))):
        other._buffer.add(round, tree_map(lambda leaf: leaf.to(device), single(task)))
    for either in (one, other):
        play(either, device, range(len(half), ROUNDS))
    return {
        "case": name,
        "stage": stage,
        "offload": offload,
        "error": error(one.save(), alone.save()),
        "resumed": error(other.save(), one.save()),
    }


def main(device: str, *cases: str) -> int:
    """Print a line for each case, stage and place of the optimizer's state; return 1 if any error is too large."""
    torch.backends.cudnn.allow_tf32 = False
    found = []
    with join_process_group(EngineSettings("deepspeed", device=device)):
        for name, (stage, offload) in itertools.product(cases or CASES, PLACES):
            try:
                line = check(name, stage, offload, device)
            except Exception as problem:  # A failure is reported like any other result.
                line = {"case": name, "stage": stage, "offload": offload, "problem": repr(problem)[:300]}
            found.append(line)
            print(json.dumps(line), flush=True)
    bad = [line for line in found if "problem" in line or max(line["error"], line["resumed"]) > NEAR]
    print(f"# {len(found) - len(bad)} of {len(found)} within {NEAR} on {device}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    status = main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)
