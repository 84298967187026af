"""The DeepSpeed engine agrees with one process at every stage, for any number of ranks."""

import functools
import json
import os
import subprocess
import sys
from itertools import product

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

import trainers.engines.local
from online_meta.testing.learner_problems import frozen
from tests.engines.cases import CASES, IN_ORDER, STEPS_PER_ROUND, follow_plans, learner, play, settings
from tests.engines.rank_program import HALF, STAGES
from tests.support.launch_ranks import ROOT, places, run_ranks, start_ranks

NEAR = 1e-5


def alone(name):
    case = {**CASES, **IN_ORDER}[name]
    return learner(case, lambda meta: trainers.engines.local.build(settings(case, "local"), meta))


@functools.cache
def played_alone(name):
    """Return the state of one process after its steps, and their reports."""
    one = alone(name)
    reports = play(one)
    return one.save(), reports


def assert_near(found, right, near=NEAR):
    """Check relative to the largest entry: values near 0 have larger relative rounding errors."""
    assert found.keys() == right.keys()
    for name, value in right.items():
        torch.testing.assert_close(found[name], value, rtol=near, atol=near * float(value.abs().max()), msg=name)


@pytest.fixture(scope="module", params=[1, 2, 4], ids=["1 rank", "2 ranks", "4 ranks"])
def played(request, tmp_path_factory, worker_id):
    """Return the number of ranks, and the folder with their results for every selected case at every stage.

    The ranks run once, whichever of pytest's processes asks first.
    """
    world, base = request.param, tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / f"{world}-ranks"
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            folder.mkdir()
            run_ranks("play_cases", folder, world, CASES=json.dumps(selected_cases(request.session, world)))
            (folder / "done").touch()
    return world, folder


def selected_cases(session, world):
    """Return the names of the cases that this run of pytest compares for a number of ranks."""
    parameters = [item.callspec.params for item in session.items if hasattr(item, "callspec")]
    return sorted({one["name"] for one in parameters if one.get("played") == world and "stage" in one})


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", CASES)
def test_twenty_steps_agree_with_one_process(played, name, stage):
    world, folder = played
    right, reports = played_alone(name)
    for rank in range(world):
        assert_near(load_file(folder / f"{name}, stage {stage}-{rank}.safetensors"), right)
        for (norm, skipped), (right_norm, _) in zip(
            json.loads((folder / f"{name}, stage {stage}-{rank}.json").read_text()), reports, strict=True
        ):
            assert skipped is None
            assert norm == pytest.approx(right_norm, rel=1e-5)
    first, *others = [(folder / f"{name}, stage {stage}-{rank}-meta.safetensors").read_bytes() for rank in range(world)]
    assert all(other == first for other in others), "every rank adapts with the same bits"


def test_the_cases_differ():
    """A wrong algorithm or a missing clipping would therefore be detected."""
    found = {}
    for name in CASES:
        one = alone(name)
        play(one)
        found[name] = torch.cat([w.flatten() for w in one.engine.meta().weights.values()])
    names = sorted(found)
    for first in names:
        for second in names[names.index(first) + 1 :]:
            assert float((found[first] - found[second]).norm() / found[first].norm()) > 100 * NEAR, (first, second)


def test_sums_that_are_not_finite_on_one_rank_are_skipped_on_all(tmp_path):
    run_ranks("not_finite", tmp_path, 2)
    right = alone("maml")
    play(right, range(HALF + 2))
    for stage in STAGES:
        for rank in range(2):
            (skipped, same), *reports = json.loads((tmp_path / f"spoilt, stage {stage}-{rank}.json").read_text())
            assert (skipped, same) == ("not_finite", True)
            assert [skipped for _, skipped in reports] == [None] * (2 * STEPS_PER_ROUND)
            assert_near(load_file(tmp_path / f"spoilt, stage {stage}-{rank}.safetensors"), right.save())


def test_any_number_of_ranks_at_any_stage_loads_the_state_of_another(tmp_path):
    """The local engine's state is loaded and saved by 2 ranks, then by 1, at each stage, bit for bit."""
    saved = {}
    for name in ("meta-sgd", "nadam"):
        one = alone(name)
        play(one, range(HALF))
        saved |= {f"{name}/{key}": value for key, value in one.save().items()}
    for world in (2, 1):
        folder = tmp_path / str(world)
        folder.mkdir()
        save_file(saved, folder / "saved.safetensors")
        run_ranks("resume", folder, world)
        for name in ("meta-sgd", "nadam"):
            right = {key.removeprefix(f"{name}/"): value for key, value in saved.items() if key.startswith(f"{name}/")}
            for stage in STAGES:
                for rank in range(world):
                    assert_near(load_file(folder / f"{name} loaded, stage {stage}-{rank}.safetensors"), right, 0.0)


def test_deterministic_ranks_learn_the_same_bits_for_any_number_of_ranks(tmp_path):
    """They equal the bits of the local engine; without ``deterministic`` the bits depend on the number of ranks."""
    bits, others = {}, set()
    for name in IN_ORDER:
        right = alone(name)
        play(right)
        bits[name] = frozen(right.save())
    for world in (1, 2, 4):
        folder = tmp_path / str(world)
        folder.mkdir()
        run_ranks("in_order", folder, world)
        for stage in STAGES:
            for rank, name in product(range(world), IN_ORDER):
                found = load_file(folder / f"{name}, stage {stage}-{rank}.safetensors")
                assert frozen(found) == bits[name], (world, stage, name)
            others.add(str(frozen(load_file(folder / f"in any order, stage {stage}-0.safetensors"))))
    assert len(others) > 1


def test_deterministic_ranks_that_follow_recorded_programs_learn_the_same_bits(tmp_path):
    """Each rank computes one task at a time, whatever number of tasks falls to it."""
    right, loop = alone("maml"), alone("maml")
    follow_plans(right, 1)
    play(right)
    play(loop)
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        run_ranks("in_order_recorded", folder, world)
        for stage in (0, 3):
            for rank in range(world):
                found = load_file(folder / f"recorded, stage {stage}-{rank}.safetensors")
                assert frozen(found) == frozen(right.save()), (world, stage)
    assert_near(right.save(), loop.save())


def test_the_optimizer_state_can_be_offloaded_to_host_memory_and_resumed():
    """This is checked with and without offloading, at every stage, against one process and after a resume."""
    command = [sys.executable, "-m", "tests.engines.on_device", "cpu", "maml clipped", "nadam"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    *lines, summary = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert summary == f"# {len(lines)} of 14 within 1e-05 on cpu"


def test_a_single_process_needs_no_agent_and_runs_no_command(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in places(1)[0]}
    command = [sys.executable, "-m", "tests.engines.rank_program", "starts_nothing", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "commands.json").read_text()) == []
    assert json.loads((tmp_path / "compilers.json").read_text()) == []  # A compiler import would add 2 s to each start.
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("stage", ["0", "2", "3"])
def test_a_hanging_rank_does_not_block_the_others(tmp_path, stage):
    first, stopped = ranks = start_ranks("hang", tmp_path, 2, STAGE=stage)
    try:
        assert first.wait(60) not in (0, None)
        assert (tmp_path / "stopped").exists(), (tmp_path / "rank-0.log").read_text()
        assert stopped.poll() is None
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
