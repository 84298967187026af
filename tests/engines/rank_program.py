"""One rank of a test: ``rank_program.py WHAT FOLDER``, with torchrun's variables; leaves what it saw in FOLDER."""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import trainers.engines.deepspeed
import trainers.engines.local
from online_meta.meta_optimizer import flatten_meta
from online_meta.replay import ReplaySample
from tests.engines.cases import CASES, learner, play, settings
from trainers.distributed.process_group import join_process_group
from trainers.settings import EngineSettings

STAGES = (0, 1, 2, 3)
HALF = 5
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")


def keep(folder: Path, name: str, rank: int, one, said) -> None:
    """Leave a learner's full state and its reports."""
    save_file({key: value.contiguous() for key, value in one.save().items()}, folder / f"{name}-{rank}.safetensors")
    save_file(
        {key: value.contiguous() for key, value in flatten_meta(one.engine.meta()).items()},
        folder / f"{name}-{rank}-meta.safetensors",
    )
    (folder / f"{name}-{rank}.json").write_text(json.dumps(said))


def sharded(case, stage, **more):
    made = settings(case, "deepspeed", zero_stage=stage, **more)
    return learner(case, lambda meta: trainers.engines.deepspeed.build(made, meta))


def every_case(folder: Path, rank: int) -> None:
    for name, case in CASES.items():
        for stage in STAGES:
            one = sharded(case, stage)
            keep(folder, f"{name}, stage {stage}", rank, one, play(one))


def not_finite(folder: Path, rank: int) -> None:
    """The last rank's sums are not finite once."""
    for stage in STAGES:
        one = sharded(CASES["maml"], stage)
        play(one, range(HALF))
        before = {key: value.clone() for key, value in one.save().items()}
        sums, weight = one._gradient(one.engine.meta(), [one._buffer[0]], [ReplaySample(0)])
        if rank == one.engine.world - 1:
            next(iter(sums.grads.weights.values())).view(-1)[0] = torch.nan
        report = one.engine.apply(sums, weight)
        after = one.save()
        same = all(torch.equal(before[key], after[key]) for key in before)
        keep(folder, f"spoilt, stage {stage}", rank, one, [[report.skipped, same], *play(one, range(HALF, HALF + 2))])


def resume(folder: Path, rank: int) -> None:
    """Take up what lies in FOLDER/saved and go on, by each stage; leave a half-way state of each as well."""
    saved = load_file(folder / "saved.safetensors")
    for name in ("meta-sgd", "nadam"):
        mine = {key.removeprefix(f"{name}/"): value for key, value in saved.items() if key.startswith(f"{name}/")}
        for stage in STAGES:
            one = sharded(CASES[name], stage)
            play(one, range(1))  # what it has learned of its own is forgotten
            one.load(mine, HALF)
            for task in range(HALF):
                one._buffer.add(task, one._buffer[0])
            keep(folder, f"{name} loaded, stage {stage}", rank, one, [])


def in_order(folder: Path, rank: int) -> None:
    for deterministic in (True, False):
        for stage in STAGES:
            one = sharded(CASES["maml"], stage, deterministic=deterministic, batching="loop")
            keep(folder, f"{deterministic}, stage {stage}", rank, one, play(one))


def starts_nothing(folder: Path, rank: int) -> None:
    """No compiler, no numactl, nothing: leaves the commands that were run, and whether a compiler was imported."""
    commands = []
    sys.addaudithook(lambda event, given: commands.append(str(given[:2])) if event in STARTS else None)
    for stage in STAGES:
        play(sharded(CASES["maml"], stage), range(2))
    (folder / "commands.json").write_text(json.dumps(commands))
    (folder / "compilers.json").write_text(json.dumps(sorted({"torch._inductor.compile_fx"} & sys.modules.keys())))


def hang(folder: Path, rank: int) -> None:
    """Rank 1 stops for good before a step; the others wait for it no longer than they were told to."""
    one = sharded(CASES["maml"], int(os.environ["STAGE"]), timeout_seconds=4.0)
    play(one, range(2))
    if rank == 1:
        (folder / "stopped").touch()
        os.kill(os.getpid(), 19)
    play(one, range(2, 4))


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[2])
    with join_process_group(EngineSettings("deepspeed")) as rank_group:
        globals()[sys.argv[1]](place, rank_group.rank)
    os._exit(0)  # as the trainer ends: threads of the process group may abort one that unwinds
