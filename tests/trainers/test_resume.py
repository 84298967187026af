"""A run that is stopped or killed anywhere and opened again gives the same bits and the same lines."""

import json
import shutil
from dataclasses import replace

import pytest

from tests.support.runs import SETTINGS, changed, kill, lines, opened, play
from tests.trainers.conftest import ROUNDS
from trainers.checkpoint import CheckpointError, load_latest
from trainers.journal.plans import read_plans
from trainers.journal.run_files import RunFiles
from trainers.loop.rounds import open_run, play_update
from trainers.settings import ModelSettings
from trainers.settings_fingerprint import (
    SettingsChanged,
    check_same_settings,
    fingerprint,
    reproducibility_key,
)

SHARED = changed(SETTINGS, meta={"max_rounds_per_update": 2})


@pytest.fixture(scope="module")
def whole(tmp_path_factory, history):
    """Return the bits and lines of a run that is never stopped and plays one round per update."""
    folder = tmp_path_factory.mktemp("whole")
    return play(folder, history, ROUNDS), lines(folder)


@pytest.mark.parametrize("stop", range(ROUNDS + 1))
def test_a_stopped_run_continues_with_the_same_bits(tmp_path, history, whole, stop):
    play(tmp_path, history, stop)
    assert len(lines(tmp_path)) == stop
    assert (play(tmp_path, history, ROUNDS), lines(tmp_path)) == whole


@pytest.mark.parametrize("updates", range(ROUNDS + 1))
def test_a_killed_run_continues_with_the_same_bits_and_writes_no_line_twice(tmp_path, history, whole, updates):
    kill(tmp_path, history, updates)
    checkpoint = load_latest(RunFiles(tmp_path).checkpoints)
    saved = checkpoint.rounds if checkpoint else 0
    assert min(updates, 3) // 3 * 3 <= saved <= updates  # A slow disk delays the checkpoints after the first.
    with open(RunFiles(tmp_path).rounds, "ab") as file:
        file.write(b'{"round":%d,"id":"to' % updates)  # the line that was being written
    assert (play(tmp_path, history, ROUNDS), lines(tmp_path)) == whole


def test_a_run_killed_after_every_third_update_gives_the_same_bits(tmp_path, history, whole):
    settings = changed(SETTINGS, checkpoint={"every_rounds": 2})
    for _ in range(3 * ROUNDS):
        kill(tmp_path, history, 3, settings)
        if len(lines(tmp_path)) == ROUNDS:
            break
    assert (play(tmp_path, history, ROUNDS, settings), lines(tmp_path)) == whole


def test_a_line_lost_in_a_kill_is_written_again(tmp_path, history, whole):
    kill(tmp_path, history, 5)
    file = RunFiles(tmp_path).rounds
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:4]))  # round 4 was not durable yet
    assert (play(tmp_path, history, ROUNDS), lines(tmp_path)) == whole


def test_a_run_is_refused_if_lines_of_checkpointed_rounds_are_missing(tmp_path, history):
    play(tmp_path, history, 3)
    file = RunFiles(tmp_path).rounds
    damaged = file.read_bytes().replace(b'"round":1', b'"round:1"')
    file.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"rounds\.jsonl is damaged: 1 lines are intact.* round 3.*Restore"):
        open_run(SETTINGS, RunFiles(tmp_path), history)
    assert file.read_bytes() == damaged, "a file that a person could repair is left unchanged"


@pytest.mark.parametrize("kill_after", [None, 5])
def test_a_run_that_draws_samples_continues_with_the_same_bits(tmp_path, history, whole, kill_after):
    """The draws are a function of the seed, the round and the step, and scores use all samples."""
    settings = changed(SETTINGS, meta={"support_samples": 2, "query_samples": 1})
    right = play(tmp_path / "whole", history, ROUNDS, settings)
    assert right != whole[0]
    if kill_after is None:
        play(tmp_path / "again", history, 4, settings)
    else:
        kill(tmp_path / "again", history, kill_after, settings)
    assert play(tmp_path / "again", history, ROUNDS, settings) == right
    assert lines(tmp_path / "again") == lines(tmp_path / "whole")


def test_all_samples_are_the_default_and_change_no_fingerprint():
    assert fingerprint(SETTINGS) == fingerprint(changed(SETTINGS, meta={"support_samples": None}))
    assert reproducibility_key(SETTINGS)["meta"]["support_samples"] is None
    assert fingerprint(SETTINGS) != fingerprint(changed(SETTINGS, meta={"query_samples": 3}))
    before = reproducibility_key(SETTINGS)
    for name in ("support_samples", "query_samples"):
        del before["meta"][name]  # as a run of before the setting has it
    check_same_settings(before, SETTINGS)
    with pytest.raises(SettingsChanged, match=r"meta\.support_samples was None and is 3"):
        check_same_settings(before, changed(SETTINGS, meta={"support_samples": 3}))


def test_a_damaged_checkpoint_costs_only_time(tmp_path, history, whole, caplog):
    play(tmp_path, history, 7)
    checkpoints = RunFiles(tmp_path).checkpoints
    (checkpoints / "7" / "ftml.0.safetensors").write_bytes(b"")
    whole_ones = [int(folder.name) for folder in checkpoints.iterdir() if folder.name in {"3", "4", "5", "6"}]
    with opened(tmp_path, history) as run:
        assert run.round == max(whole_ones)  # 3 and 6, unless a slow disk delayed the checkpoints after the first.
    assert "skipping the checkpoint of round 7" in caplog.text
    assert (play(tmp_path, history, ROUNDS), lines(tmp_path)) == whole


def test_a_round_that_does_not_repeat_is_logged_and_its_first_score_stays(tmp_path, history, caplog):
    kill(tmp_path, history, 2)
    file = RunFiles(tmp_path).rounds
    first, second = [json.loads(line) for line in file.read_bytes().splitlines()]
    second["loss_after"] = 0.125
    file.write_text("".join(json.dumps(line) + "\n" for line in (first, second)))
    play(tmp_path, history, 3)
    assert "round 1 does not repeat: loss_after was 0.125 and is" in caplog.text
    assert "round 0" not in caplog.text
    assert [line["loss_after"] for line in lines(tmp_path)][1] == 0.125


def test_an_exact_repetition_logs_nothing(tmp_path, history, caplog):
    kill(tmp_path, history, 2)
    play(tmp_path, history, 3)
    assert caplog.text == ""


@pytest.mark.parametrize("updates", range(6))
def test_shared_updates_are_replayed_as_they_were_logged(tmp_path, history, updates):
    """This holds whatever rounds are available the second time, and whatever the limit is then."""
    right = play(tmp_path / "whole", history, ROUNDS, SHARED)
    assert [plan.rounds for plan in read_plans(RunFiles(tmp_path / "whole").update_log)] == [2, 2, 2, 2, 1]
    if updates < 5:
        kill(tmp_path / "cut", history, updates, SHARED)
    else:
        (tmp_path / "cut" / "history").mkdir(parents=True)
        shutil.copy(RunFiles(tmp_path / "whole").update_log, RunFiles(tmp_path / "cut").update_log)
    planned = read_plans(RunFiles(tmp_path / "cut").update_log)
    assert len(planned) == min(updates, 5)
    again = SETTINGS if updates == 5 else SHARED
    assert play(tmp_path / "cut", history, ROUNDS, again) == right
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert read_plans(RunFiles(tmp_path / "cut").update_log) == read_plans(RunFiles(tmp_path / "whole").update_log)


def test_sharing_updates_gives_different_bits(tmp_path, history, whole):
    assert play(tmp_path, history, ROUNDS, SHARED) != whole[0]


def test_an_update_is_logged_before_its_rounds_are_played(tmp_path, history, monkeypatch):
    with opened(tmp_path, history) as run:
        monkeypatch.setattr(type(run.buffer), "__getitem__", lambda self, round: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            play_update(run, 1)
    assert [tuple(plan) for plan in read_plans(RunFiles(tmp_path).update_log)] == [(0, 1)]


CHANGES = {
    "inner.lr was 0.1 and is 0.2": {"inner": {"lr": 0.2}},
    "inner.fast was ['*'] and is ['1.*']": {"inner": {"fast": ("1.*",)}},
    "meta.optimizer was 'adam' and is 'sgd'": {"meta": {"optimizer": "sgd"}},
    "meta.clip_norm was 10.0 and is None": {"meta": {"clip_norm": None}},
    "engine.threads was 1 and is 2": {"engine": {"threads": 2}},
    "regret.baselines was ['train_on_everything', 'from_scratch'] and is []": {"regret": {"baselines": ()}},
    "regret.options was {'from_scratch': {'steps': 2}} and is {}": {"regret": {"options": {}}},
}


@pytest.fixture(scope="module")
def started_run(tmp_path_factory, history):
    folder = tmp_path_factory.mktemp("started_run")
    play(folder, history, 3)
    return folder


@pytest.mark.parametrize(("message", "changes"), CHANGES.items(), ids=CHANGES)
def test_other_settings_are_refused_by_name_with_both_values(started_run, history, message, changes):
    with pytest.raises(SettingsChanged) as caught:
        open_run(changed(SETTINGS, **changes), RunFiles(started_run), history)
    assert f"other settings: {message}. Set them back" in str(caught.value)


def test_another_seed_is_refused(started_run, history):
    with pytest.raises(SettingsChanged, match="seed was 0 and is 1"):
        open_run(replace(SETTINGS, seed=1), RunFiles(started_run), history)


def test_all_differences_are_named(started_run, history):
    settings = changed(SETTINGS, inner={"lr": 0.2, "steps": 3}, meta={"batch": 5})
    with pytest.raises(
        SettingsChanged, match=r"inner\.lr was .*; inner\.steps was 1 and is 3; meta\.batch was 4 and is 5"
    ):
        open_run(settings, RunFiles(started_run), history)


def test_another_model_is_refused_before_its_weights_are_compared(started_run, history):
    other = replace(SETTINGS, model=ModelSettings("trainers.models:mlp", {**SETTINGS.model.args, "hidden": [5]}))
    with pytest.raises(SettingsChanged, match=r"model\.args was .*\[4\].* and is .*\[5\]"):
        open_run(other, RunFiles(started_run), history)


def test_settings_that_do_not_affect_parameters_may_change(started_run, history):
    settings = changed(
        SETTINGS,
        meta={"max_rounds_per_update": 9},
        checkpoint={"every_rounds": 100, "keep": 1},
        regret={"every_rounds": 7, "hindsight_steps": 1.0},
    )
    with opened(started_run, history, settings) as run:
        assert run.round == 3
