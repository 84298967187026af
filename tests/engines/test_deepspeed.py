"""The DeepSpeed engine gives the answer of one process, at every stage, by any number of ranks."""

import functools
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import trainers.engines.local
from online_meta.testing.learner_problems import frozen
from tests.engines.cases import CASES, STEPS_PER_ROUND, learner, play, settings
from tests.engines.rank_program import HALF, STAGES
from tests.support.launch_ranks import ROOT, places, run_ranks, start_ranks

NEAR = 1e-5


def alone(name):
    case = CASES[name]
    return learner(case, lambda meta: trainers.engines.local.build(settings(case, "local"), meta))


@functools.cache
def played_alone(name):
    """Return the state of one process after its steps, and their reports."""
    one = alone(name)
    reports = play(one)
    return one.save(), reports


def assert_near(found, right, near=NEAR):
    """Relative to the largest entry: what is nearly 0 has rounding of its own."""
    assert found.keys() == right.keys()
    for name, value in right.items():
        torch.testing.assert_close(found[name], value, rtol=near, atol=near * float(value.abs().max()), msg=name)


@pytest.fixture(scope="module", params=[1, 2, 4], ids=["1 rank", "2 ranks", "4 ranks"])
def played(request, tmp_path_factory):
    """All cases at all stages by so many ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks("every_case", folder, request.param)
    return request.param, folder


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", CASES)
def test_twenty_steps_are_those_of_one_process(played, name, stage):
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
    """So a wrong algorithm, or a clipping that is left out, would be seen."""
    found = {}
    for name in CASES:
        one = alone(name)
        play(one)
        found[name] = torch.cat([w.flatten() for w in one.engine.meta().weights.values()])
    names = sorted(found)
    for first in names:
        for second in names[names.index(first) + 1 :]:
            assert float((found[first] - found[second]).norm() / found[first].norm()) > 100 * NEAR, (first, second)


def test_what_is_not_finite_on_one_rank_is_skipped_on_all(tmp_path):
    run_ranks("not_finite", tmp_path, 2)
    right = alone("maml")
    play(right, range(HALF + 2))
    for stage in STAGES:
        for rank in range(2):
            (skipped, same), *reports = json.loads((tmp_path / f"spoilt, stage {stage}-{rank}.json").read_text())
            assert (skipped, same) == ("not_finite", True)
            assert [skipped for _, skipped in reports] == [None] * (2 * STEPS_PER_ROUND)
            assert_near(load_file(tmp_path / f"spoilt, stage {stage}-{rank}.safetensors"), right.save())


def test_any_number_of_ranks_at_any_stage_takes_up_what_another_saved(tmp_path):
    """What the local engine saved is loaded and saved again by 2 ranks, then by 1, at each stage: bit for bit."""
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


def test_deterministic_ranks_learn_the_same_bits_whatever_their_number(tmp_path):
    """Those of the local engine, too; and others without, so that an order by ranks would be seen."""
    right = alone("maml")
    play(right)
    bits, others = frozen(right.save()), set()
    for world in (1, 2, 4):
        folder = tmp_path / str(world)
        folder.mkdir()
        run_ranks("in_order", folder, world)
        for stage in STAGES:
            for rank in range(world):
                assert frozen(load_file(folder / f"True, stage {stage}-{rank}.safetensors")) == bits, (world, stage)
            others.add(str(frozen(load_file(folder / f"False, stage {stage}-0.safetensors"))))
    assert len(others) > 1


def test_the_optimizers_state_may_lie_in_the_hosts_memory_and_a_run_goes_on_from_it():
    """With and without, at every stage, against one process; a half-way state is taken up by another engine."""
    command = [sys.executable, "-m", "tests.engines.on_device", "cpu", "maml clipped", "nadam"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    *lines, summary = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert summary == f"# {len(lines)} of 14 within 1e-05 on cpu"


def test_one_process_needs_no_torchrun_and_runs_no_command(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in places(1)[0]}
    command = [sys.executable, "-m", "tests.engines.rank_program", "starts_nothing", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "commands.json").read_text()) == []
    assert json.loads((tmp_path / "compilers.json").read_text()) == []  # It would make each start 2 s longer.
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("stage", ["0", "2", "3"])
def test_a_rank_that_hangs_hangs_no_other(tmp_path, stage):
    first, stopped = ranks = start_ranks("hang", tmp_path, 2, STAGE=stage)
    try:
        assert first.wait(60) not in (0, None)
        assert (tmp_path / "stopped").exists(), (tmp_path / "rank-0.log").read_text()
        assert stopped.poll() is None
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
