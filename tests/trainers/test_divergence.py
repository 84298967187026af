"""A diverging leader rolls back, halves its rate and continues, identically on replay; or the run stops."""

import itertools
import shutil
import time
from threading import Event

import pytest

from online_meta.testing.learner_problems import frozen
from streams.history.history import History
from tests.support.runs import FALLING, changed, fill, kill, lines, opened, play, task
from trainers.checkpoint import list_checkpoints, load_checkpoint, load_latest, publish_checkpoint
from trainers.journal.divergence import Diverged, Rollback, RollbackLog, SkipStreak, list_rollback_targets
from trainers.journal.run_files import RunFiles
from trainers.loop.rounds import play_rounds, play_update
from trainers.settings import ModelSettings
from trainers.settings_fingerprint import check_same_settings, fingerprint, reproducibility_key

ROUNDS = 40


@pytest.fixture(scope="module")
def forty_rounds(tmp_path_factory):
    with History.open(tmp_path_factory.mktemp("forty_rounds"), write=True) as opened:
        fill(opened, [task(t) for t in range(ROUNDS)])
        yield opened


def read_rollbacks(folder, settings=FALLING):
    log = RollbackLog(RunFiles(folder).rollback_log, fingerprint(settings))
    log.close()
    return log.rollbacks


@pytest.fixture(scope="module")
def diverged_run(tmp_path_factory, forty_rounds):
    """Return the folder and final bits of a run that diverged and was never stopped."""
    folder = tmp_path_factory.mktemp("diverged_run")
    return folder, play(folder, forty_rounds, ROUNDS, FALLING)


def test_a_diverging_run_rolls_back_and_halves_its_rate_until_it_is_stable(diverged_run, forty_rounds):
    folder, _ = diverged_run
    rollback_log = read_rollbacks(folder)
    assert len(rollback_log) >= 2
    assert all(one.back_to < one.round for one in rollback_log)
    skipped = [[step["skipped"] for step in line["steps"]] != [None] for line in lines(folder)]
    runs = [len(list(group)) for bad, group in itertools.groupby(skipped) if bad]
    assert max(runs) <= 3 * len(rollback_log)
    assert not any(skipped[-10:]), "it has found a stable rate"
    with opened(folder, forty_rounds, FALLING) as run:
        assert run.learners["ftml"].lr_scale == 0.5 ** len(rollback_log)


def test_a_rollback_follows_max_skipped_steps_and_restores_a_checkpoint(tmp_path, forty_rounds):
    first = None
    with opened(tmp_path, forty_rounds, FALLING) as run:
        while first is None:
            play_rounds(run, Event(), run.round + 1)
            if run.journal.streak.length == 3:
                first = run.round
        oldest, *newer = list_checkpoints(RunFiles(tmp_path).checkpoints)
        assert len(newer) == 2, "the rollback target is kept although there are two newer checkpoints"
        back = load_checkpoint(RunFiles(tmp_path).checkpoints / str(oldest)).learners["ftml"]
        play_rounds(run, Event(), first + 1)
        (rollback,) = run.journal.rollback_log.rollbacks
        assert rollback == Rollback(first, oldest)
        assert run.learners["ftml"].engine.lr_scale == 0.5
    with opened(tmp_path / "again", forty_rounds, FALLING) as again:
        again.learners["ftml"].load(back, first)
        again.learners["ftml"].lr_scale = 0.5
        again.round = first
        play_update(again, 1)
        expected = frozen(again.learners["ftml"].save())
    assert frozen(load_latest(RunFiles(tmp_path).checkpoints).learners["ftml"]) == expected


@pytest.mark.parametrize("every", [1, 2, 5])
def test_a_run_killed_repeatedly_ends_where_its_replay_ends(tmp_path, forty_rounds, every):
    for _ in range(4 * ROUNDS):
        kill(tmp_path / "killed", forty_rounds, every + 1, FALLING)
        if len(lines(tmp_path / "killed")) == ROUNDS:
            break
    killed = play(tmp_path / "killed", forty_rounds, ROUNDS, FALLING)
    assert len(read_rollbacks(tmp_path / "killed")) >= 2
    replay = RunFiles(tmp_path / "replay")
    replay.history.mkdir(parents=True)
    shutil.copy(RunFiles(tmp_path / "killed").rollback_log, replay.rollback_log)
    slow = changed(FALLING, checkpoint={"every_rounds": 1000, "keep": 1})
    assert play(replay.folder, forty_rounds, ROUNDS, slow) == killed
    assert lines(replay.folder) == lines(tmp_path / "killed")
    assert read_rollbacks(replay.folder) == read_rollbacks(tmp_path / "killed")


def test_a_rollback_waits_for_a_checkpoint_that_is_being_written(tmp_path, diverged_run, forty_rounds, monkeypatch):
    folder, right = diverged_run
    replay = RunFiles(tmp_path)
    replay.history.mkdir(parents=True)
    shutil.copy(RunFiles(folder).rollback_log, replay.rollback_log)
    monkeypatch.setattr("trainers.loop.async_checkpoint.publish_checkpoint", delayed(publish_checkpoint))
    slow = changed(FALLING, checkpoint={"every_rounds": 1000, "keep": 1})
    assert play(tmp_path, forty_rounds, ROUNDS, slow) == right


def delayed(publish):
    def wait_and_publish(*arguments):
        time.sleep(0.5)
        publish(*arguments)

    return wait_and_publish


def test_rollbacks_of_other_settings_are_ignored(tmp_path, diverged_run, forty_rounds):
    folder, _ = diverged_run
    files = RunFiles(tmp_path)
    files.history.mkdir(parents=True)
    shutil.copy(RunFiles(folder).rollback_log, files.rollback_log)
    calm = changed(FALLING, meta={"lr": 0.01})
    play(tmp_path, forty_rounds, ROUNDS, calm)
    assert read_rollbacks(tmp_path, calm) == []
    assert all(step["skipped"] is None for line in lines(tmp_path) for step in line["steps"])


def test_a_run_set_to_stop_raises_diverged_with_advice(tmp_path, forty_rounds):
    stopping = changed(FALLING, meta={"when_diverged": "stop"})
    for _ in range(2):  # The next start stops at the same round.
        with pytest.raises(Diverged, match=r"3 meta-steps in a row, from round .* replay"):
            play(tmp_path, forty_rounds, ROUNDS, stopping)
    before = len(lines(tmp_path))
    assert before < ROUNDS
    play(tmp_path, forty_rounds, ROUNDS, FALLING)  # The setting may be changed later.
    assert len(lines(tmp_path)) == ROUNDS


def test_a_run_that_never_stabilises_stops_after_the_last_rollback(tmp_path, forty_rounds, monkeypatch):
    monkeypatch.setattr("trainers.loop.recovery.MAX_ROLLBACKS", 2)
    wild = changed(FALLING, meta={"lr": 1e20, "max_skipped": 1})
    with pytest.raises(Diverged, match="and 2 rollbacks have not helped"):
        play(tmp_path, forty_rounds, ROUNDS, wild)


def test_the_rollback_target_is_the_newest_good_checkpoint():
    def choose(saved, first, rollback_log=(), good=True):
        return list_rollback_targets(saved, SkipStreak(3, first, good), [Rollback(*one) for one in rollback_log])[0]

    assert choose([2, 4, 6], first=5) == 4
    assert choose([2, 4, 6], first=6) == 6
    assert choose([2, 4, 6], first=1) == 0
    assert choose([], first=9) == 0
    assert choose([2, 4, 6, 9], first=12, rollback_log=[(8, 4)]) == 9
    assert choose([2, 4, 6], first=12, rollback_log=[(8, 4)]) == 4, "6 lies on the branch that diverged"
    assert choose([2, 4, 6], first=8, rollback_log=[(8, 4)], good=False) == 2, "the previous target did not help"


def test_the_fingerprint_covers_every_setting_that_changes_results():
    assert fingerprint(FALLING) == fingerprint(changed(FALLING, meta={"max_skipped": 9, "when_diverged": "stop"}))
    differing = [
        changed(FALLING, meta={"schedule": "cosine"}),
        changed(FALLING, meta={"lr": 0.2}),
        changed(FALLING, model={"precision": "bfloat16"}),
        changed(FALLING, model={"args": {"inputs": 3}}),
    ]
    assert len({fingerprint(one) for one in [FALLING, *differing]}) == 5


def test_a_run_of_an_older_version_with_fewer_settings_continues():
    before = reproducibility_key(FALLING)
    del before["model"]["precision"], before["meta"]["schedule"]
    check_same_settings(before, FALLING)
    assert ModelSettings("x").precision == "float32"
