"""One rank of a test: ``rank_program.py WHAT FOLDER``, with the agent's variables; writes its results into FOLDER."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import trainers.build
import trainers.engines.deepspeed
import trainers.engines.local
from online_meta.meta_optimizer import flatten_meta
from online_meta.replay import ReplaySample
from tests.engines.cases import CASES, IN_ORDER, follow_plans, learner, play, settings
from tests.support.frozen_runs import frozen_settings, play_frozen, watch_residence
from trainers.distributed.process_group import join_process_group
from trainers.settings import EngineSettings
from trainers.shared_weights import share_frozen_weights

STAGES = (0, 1, 2, 3)
HALF = 5
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")


def save_results(folder: Path, name: str, rank: int, one, reports) -> None:
    """Save a learner's full state and its reports."""
    save_file({key: value.contiguous() for key, value in one.save().items()}, folder / f"{name}-{rank}.safetensors")
    save_file(
        {key: value.contiguous() for key, value in flatten_meta(one.engine.meta()).items()},
        folder / f"{name}-{rank}-meta.safetensors",
    )
    (folder / f"{name}-{rank}.json").write_text(json.dumps(reports))


def sharded(case, stage, **more):
    made = settings(case, "deepspeed", zero_stage=stage, **more)
    return learner(case, lambda meta: trainers.engines.deepspeed.build(made, meta))


def play_cases(folder: Path, rank: int) -> None:
    for name in json.loads(os.environ["CASES"]):
        for stage in STAGES:
            one = sharded(CASES[name], stage)
            save_results(folder, f"{name}, stage {stage}", rank, one, play(one))


def not_finite(folder: Path, rank: int) -> None:
    """Make the last rank's sums not finite in one step."""
    for stage in STAGES:
        one = sharded(CASES["maml"], stage)
        play(one, range(HALF))
        before = {key: value.clone() for key, value in one.save().items()}
        sums, weight = one._gradient_sum.sum_tasks(one.engine.meta(), [one._buffer[0]], [ReplaySample(0)])
        if rank == one.engine.world - 1:
            next(iter(sums.grads.weights.values())).view(-1)[0] = torch.nan
        report = one.engine.apply(sums, weight)
        after = one.save()
        same = all(torch.equal(before[key], after[key]) for key in before)
        save_results(
            folder, f"spoilt, stage {stage}", rank, one, [[report.skipped, same], *play(one, range(HALF, HALF + 2))]
        )


def resume(folder: Path, rank: int) -> None:
    """Load FOLDER/saved and continue at each stage; save the loaded state of each as well."""
    saved = load_file(folder / "saved.safetensors")
    for name in ("meta-sgd", "nadam"):
        mine = {key.removeprefix(f"{name}/"): value for key, value in saved.items() if key.startswith(f"{name}/")}
        for stage in STAGES:
            one = sharded(CASES[name], stage)
            play(one, range(1))  # loading replaces what it has learned
            one.load(mine, HALF)
            for task in range(HALF):
                one._buffer.add(task, one._buffer[0])
            save_results(folder, f"{name} loaded, stage {stage}", rank, one, [])


def in_order(folder: Path, rank: int) -> None:
    for name, case in IN_ORDER.items():
        for stage in STAGES:
            one = sharded(case, stage, deterministic=True, batching="loop")
            save_results(folder, f"{name}, stage {stage}", rank, one, play(one))
    for stage in STAGES:
        one = sharded(CASES["maml"], stage, batching="loop")
        save_results(folder, f"in any order, stage {stage}", rank, one, play(one))


def in_order_recorded(folder: Path, rank: int) -> None:
    """Follow the plans that deterministic ranks choose."""
    for stage in (0, 3):
        one = sharded(CASES["maml"], stage, deterministic=True, batching="traced")
        follow_plans(one, one.engine.world)
        save_results(folder, f"recorded, stage {stage}", rank, one, play(one))


def read_frozen_weights(folder: Path, rank: int) -> None:
    """Learn with whole frozen weights and with those of a file; note the largest share of it that was resident."""
    shares: list[float] = []

    def share(module, place):
        kept = share_frozen_weights(module, place)
        kept.release(kept.tensors)
        return watch_residence(kept, next(place.iterdir()), shares)

    trainers.build.share_frozen_weights = share
    for name, place in (("whole", ""), ("kept", folder / "kept")):
        made = frozen_settings("", kind="deepspeed", processes=2, zero_stage=3)
        _, state = play_frozen(replace(made, engine=replace(made.engine, frozen_folder=place)))
        save_file({key: value.contiguous() for key, value in state.items()}, folder / f"{name}-{rank}.safetensors")
    (folder / f"kept-{rank}.json").write_text(json.dumps(max(shares)))


def starts_nothing(folder: Path, rank: int) -> None:
    """Write the commands that were run, which must be none, and whether a compiler was imported."""
    commands = []
    sys.addaudithook(lambda event, given: commands.append(str(given[:2])) if event in STARTS else None)
    for stage in STAGES:
        play(sharded(CASES["maml"], stage), range(2))
    (folder / "commands.json").write_text(json.dumps(commands))
    (folder / "compilers.json").write_text(json.dumps(sorted({"torch._inductor.compile_fx"} & sys.modules.keys())))


def hang(folder: Path, rank: int) -> None:
    """Stop rank 1 forever before a step; the other rank waits no longer than its timeout."""
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
    os._exit(0)  # as in the trainer: threads of the process group may abort a process that unwinds
