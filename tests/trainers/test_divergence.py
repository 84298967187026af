"""A leader that falls off goes back, steps half as far and goes on, the same way whenever it is played; or stops."""

import itertools
import shutil
import time
from threading import Event

import pytest

from online_meta.testing.learner_problems import frozen
from streams.history.history import History
from tests.support.runs import SETTINGS, changed, fill, kill, lines, opened, play, task
from trainers.checkpoint import list_checkpoints, load_checkpoint, load_latest, publish_checkpoint
from trainers.journal.divergence import Diverged, Rollback, RollbackLog, SkipStreak, list_rollback_targets
from trainers.journal.run_files import RunFiles
from trainers.loop.rounds import play_rounds, play_update
from trainers.settings import ModelSettings
from trainers.settings_fingerprint import check_same_settings, fingerprint, reproducibility_key

ROUNDS = 40
FALLING = changed(
    SETTINGS,
    model={"loss": "tests.support.edge:loss"},
    meta={"lr": 1.5, "max_skipped": 3, "steps_per_round": 1},
    regret={"baselines": ()},
    checkpoint={"every_rounds": 1, "keep": 2},
)


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    with History.open(tmp_path_factory.mktemp("long"), write=True) as opened:
        fill(opened, [task(t) for t in range(ROUNDS)])
        yield opened


def book_of(folder, settings=FALLING):
    book = RollbackLog(RunFiles(folder).rollback_log, fingerprint(settings))
    book.close()
    return book.rollbacks


@pytest.fixture(scope="module")
def fallen(tmp_path_factory, long):
    """A run that fell off and was never stopped."""
    folder = tmp_path_factory.mktemp("fallen")
    return folder, play(folder, long, ROUNDS, FALLING)


def test_it_goes_back_and_steps_half_as_far_until_it_stays(fallen, long):
    folder, _ = fallen
    rollback_log = book_of(folder)
    assert len(rollback_log) >= 2
    assert all(one.back_to < one.round for one in rollback_log)
    skipped = [[step["skipped"] for step in line["steps"]] != [None] for line in lines(folder)]
    runs = [len(list(group)) for bad, group in itertools.groupby(skipped) if bad]
    assert max(runs) <= 3 * len(rollback_log)
    assert not any(skipped[-10:]), "it has found a rate at which it stays"
    with opened(folder, long, FALLING) as run:
        assert run.learners["ftml"].lr_scale == 0.5 ** len(rollback_log)


def test_before_a_rollback_a_run_has_skipped_so_many_steps_and_after_it_is_what_it_was(tmp_path, long):
    first = None
    with opened(tmp_path, long, FALLING) as run:
        while first is None:
            play_rounds(run, Event(), run.round + 1)
            if run.journal.streak.length == 3:
                first = run.round
        oldest, *newer = list_checkpoints(RunFiles(tmp_path).checkpoints)
        assert len(newer) == 2, "it is held though there are two newer ones"
        back = load_checkpoint(RunFiles(tmp_path).checkpoints / str(oldest)).learners["ftml"]
        play_rounds(run, Event(), first + 1)
        (rollback,) = run.journal.rollback_log.rollbacks
        assert rollback == Rollback(first, oldest)
        assert run.learners["ftml"].engine.lr_scale == 0.5
    with opened(tmp_path / "again", long, FALLING) as again:
        again.learners["ftml"].load(back, first)
        again.learners["ftml"].lr_scale = 0.5
        again.round = first
        play_update(again, 1)
        expected = frozen(again.learners["ftml"].save())
    assert frozen(load_latest(RunFiles(tmp_path).checkpoints).learners["ftml"]) == expected


@pytest.mark.parametrize("every", [1, 2, 5])
def test_killed_again_and_again_it_comes_to_what_its_own_history_says(tmp_path, long, every):
    for _ in range(4 * ROUNDS):
        kill(tmp_path / "killed", long, every + 1, FALLING)
        if len(lines(tmp_path / "killed")) == ROUNDS:
            break
    killed = play(tmp_path / "killed", long, ROUNDS, FALLING)
    assert len(book_of(tmp_path / "killed")) >= 2
    replay = RunFiles(tmp_path / "replay")
    replay.history.mkdir(parents=True)
    shutil.copy(RunFiles(tmp_path / "killed").rollback_log, replay.rollback_log)
    slow = changed(FALLING, checkpoint={"every_rounds": 1000, "keep": 1})
    assert play(replay.folder, long, ROUNDS, slow) == killed
    assert lines(replay.folder) == lines(tmp_path / "killed")
    assert book_of(replay.folder) == book_of(tmp_path / "killed")


def test_a_checkpoint_that_is_still_being_written_is_waited_for(tmp_path, fallen, long, monkeypatch):
    folder, right = fallen
    replay = RunFiles(tmp_path)
    replay.history.mkdir(parents=True)
    shutil.copy(RunFiles(folder).rollback_log, replay.rollback_log)
    monkeypatch.setattr("trainers.loop.async_checkpoint.publish_checkpoint", slowly(publish_checkpoint))
    slow = changed(FALLING, checkpoint={"every_rounds": 1000, "keep": 1})
    assert play(tmp_path, long, ROUNDS, slow) == right


def slowly(publish):
    def wait_and_publish(*arguments):
        time.sleep(0.5)
        publish(*arguments)

    return wait_and_publish


def test_other_settings_have_rollbacks_of_their_own(tmp_path, fallen, long):
    folder, _ = fallen
    files = RunFiles(tmp_path)
    files.history.mkdir(parents=True)
    shutil.copy(RunFiles(folder).rollback_log, files.rollback_log)
    calm = changed(FALLING, meta={"lr": 0.01})
    play(tmp_path, long, ROUNDS, calm)
    assert book_of(tmp_path, calm) == []
    assert all(step["skipped"] is None for line in lines(tmp_path) for step in line["steps"])


def test_it_stops_when_it_is_told_to_and_says_what_can_be_done(tmp_path, long):
    stopping = changed(FALLING, meta={"when_diverged": "stop"})
    for _ in range(2):  # The next start stops at the same place.
        with pytest.raises(Diverged, match=r"3 meta-steps in a row, from round .* replay"):
            play(tmp_path, long, ROUNDS, stopping)
    before = len(lines(tmp_path))
    assert before < ROUNDS
    play(tmp_path, long, ROUNDS, FALLING)  # What becomes of it may be decided later.
    assert len(lines(tmp_path)) == ROUNDS


def test_one_that_never_stays_stops_in_the_end(tmp_path, long, monkeypatch):
    monkeypatch.setattr("trainers.loop.recovery.MAX_ROLLBACKS", 2)
    wild = changed(FALLING, meta={"lr": 1e20, "max_skipped": 1})
    with pytest.raises(Diverged, match="and 2 rollbacks have not helped"):
        play(tmp_path, long, ROUNDS, wild)


def test_the_newest_checkpoint_that_was_good():
    def choose(saved, first, rollback_log=(), good=True):
        return list_rollback_targets(saved, SkipStreak(3, first, good), [Rollback(*one) for one in rollback_log])[0]

    assert choose([2, 4, 6], first=5) == 4
    assert choose([2, 4, 6], first=6) == 6
    assert choose([2, 4, 6], first=1) == 0
    assert choose([], first=9) == 0
    assert choose([2, 4, 6, 9], first=12, rollback_log=[(8, 4)]) == 9
    assert choose([2, 4, 6], first=12, rollback_log=[(8, 4)]) == 4, "the one between is like what diverged"
    assert choose([2, 4, 6], first=8, rollback_log=[(8, 4)], good=False) == 2, "the one it went back to did not help"


def test_the_fingerprint_does_not_know_settings_at_their_defaults_and_all_others():
    assert fingerprint(FALLING) == fingerprint(changed(FALLING, meta={"max_skipped": 9, "when_diverged": "stop"}))
    differing = [
        changed(FALLING, meta={"schedule": "cosine"}),
        changed(FALLING, meta={"lr": 0.2}),
        changed(FALLING, model={"precision": "bfloat16"}),
        changed(FALLING, model={"args": {"inputs": 3}}),
    ]
    assert len({fingerprint(one) for one in [FALLING, *differing]}) == 5


def test_a_run_of_a_version_that_knew_fewer_settings_goes_on():
    before = reproducibility_key(FALLING)
    del before["model"]["precision"], before["meta"]["schedule"]
    check_same_settings(before, FALLING)
    assert ModelSettings("x").precision == "float32"
