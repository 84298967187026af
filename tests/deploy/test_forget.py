"""An entity that is forgotten is in no file of the run, and the learners are those that never met it."""

import json
import os
import shutil
import signal
import struct
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from deploy.erasure import STEPS, apply_erasures, forget_entity
from online_meta.types import Batch, Task
from streams.entities import make_entity_id
from streams.formats import wire
from streams.history.erasure import list_logs, list_pending
from streams.history.errors import RoundForgotten
from streams.history.history import History
from streams.history.observations import keep_rows, list_observed
from streams.history.predictions import Kept, Room, keep_prediction, list_predicted
from streams.history.retention import RetentionSettings, compact, subsample
from streams.history.sealing import SealingSettings, evict_payloads, seal_next
from streams.history.verify import verify
from streams.ingest.dead_letters import DeadLetters, read_letters
from streams.ingest.ingest import Ingest
from streams.spec import Limits, TaskSpec
from streams.types import Arrival, Receipt, Record, Rejected, Scales
from tests.deploy.conftest import Cli
from tests.support.runs import SETTINGS, changed, lines, play, task
from tests.support.traces import find_traces
from trainers.checkpoint import list_checkpoints, load_checkpoint
from trainers.journal.quarantine import QuarantineLog, QuarantineReader, make_quarantine
from trainers.journal.run_files import RunFiles

KEY, ROUNDS = "Café 7", 17
OWN = (4, 5, 9, 14)
MARK = struct.pack("<2f", 0.7234567, -0.3234567)
TRACES = (b"..Caf_c3_a9_207..",)
KEEPING = changed(SETTINGS, checkpoint={"keep": 100})
GROUPED = changed(SETTINGS, meta={"max_rounds_per_update": 4})
"""With the two newest checkpoints, so that an erasure leaves none."""


def marked(t: int) -> Task:
    """Return a task whose sets have a row with the bytes ``MARK``."""
    row = torch.frombuffer(bytearray(MARK), dtype=torch.float32)
    return Task(*(Batch(torch.cat([part.x[1:], row[None]]), part.y) for part in task(t)))


def id_of(t: int) -> str:
    return make_entity_id("shops", KEY if t in OWN else f"other {t % 3}", str(t))


def record(t: int) -> Record:
    body = wire.encode(marked(t) if t in OWN else task(t))
    return Record(id_of(t), body, wire.digest(body), "shops", f"row {t}", 1.0, Scales(1.0 + t, None))


def make_run(folder: Path, settings: Any = KEEPING) -> RunFiles:
    """Make a run that has played its rounds, of which some are sealed, and some are only in the archive."""
    files = RunFiles(folder)
    with History.open(files.history, write=True) as history:
        history.append([record(t) for t in range(ROUNDS)])
        sealing = SealingSettings(segment_rounds=5)
        while seal_next(history, sealing):
            pass
        first = history.query("SELECT last FROM segments ORDER BY first")[0][0]
        assert first == 4
        evict_payloads(history, 0)
        play(folder, history, ROUNDS, settings)
        for key in (KEY, "other"):
            own = marked(0) if key == KEY else task(0)
            keep_rows(history, key, "monday", own.support, 6)
            kept = Kept(make_entity_id("http", key, "p1"), key, 3, 6, 6, None, "[]", wire.encode(own))
            keep_prediction(history, kept, Room(9, 1 << 20, 9), now=0.0)
    letters = DeadLetters(files.dead_letters, 10, 1 << 20)
    for t, body in ((4, wire.encode(marked(4))), (0, b"x")):
        letters.put(Arrival(id_of(t), body, "shops", None), Rejected("conflict", id_of(t)))
    files.quarantine_requests.write_text(json.dumps({"round": 5, "reason": f"bad {id_of(5)}", "timestamp": 1.0}) + "\n")
    (folder / "report.json").write_text(json.dumps(id_of(5)))
    (folder / "replay").mkdir()
    (folder / "replay" / "rounds.jsonl").write_text(id_of(5))
    return files


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("made") / "run", KEEPING).folder


@pytest.fixture
def run(tmp_path: Path, made: Path) -> RunFiles:
    shutil.copytree(made, tmp_path / "run")
    return RunFiles(tmp_path / "run")


@pytest.fixture(scope="module")
def erased(tmp_path_factory: pytest.TempPathFactory, made: Path) -> RunFiles:
    """A run whose erasure nothing has interrupted."""
    folder = tmp_path_factory.mktemp("erased") / "run"
    shutil.copytree(made, folder)
    forget_entity(folder, KEY)
    return RunFiles(folder)


def die_at(accesses: int) -> None:
    """Let this process die just before its next access to the file system but ``accesses`` that changes something."""
    left = accesses

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        writes = event == "open" and "r" not in str(arguments[1])
        if writes or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def play_on(files: RunFiles, settings: Any = KEEPING) -> Any:
    with History.open(files.history, write=False) as history:
        return play(files.folder, history, ROUNDS, settings)


def test_no_file_of_the_run_has_anything_of_the_entity(run: RunFiles) -> None:
    before = " ".join(find_traces(run.folder, KEY, MARK, TRACES))
    for place in ("ledger.sqlite", "dead-letters", "rounds.jsonl", "replay", "requests", "report.json", "00000-0"):
        assert place in before
    (done,) = forget_entity(run.folder, KEY)
    assert done.rounds == OWN
    assert find_traces(run.folder, KEY, MARK, TRACES) == []
    assert [letter["id"] for _, letter in read_letters(run.dead_letters)] == [id_of(0)]
    with History.open(run.history, write=False) as history:
        assert list_observed(history) == list_predicted(history) == ["other"]
        assert history.scales("shops", ROUNDS) == [Scales(1.0 + t, None) for t in range(ROUNDS) if t not in OWN]
        for t in range(ROUNDS):
            if t in OWN:
                with pytest.raises(RoundForgotten):
                    history.payload(t)
            else:
                assert history.payload(t) == record(t).payload
    assert verify(run.history).clean
    play_on(run)
    assert find_traces(run.folder, KEY, MARK, TRACES) == []


@pytest.mark.parametrize("settings", [KEEPING, GROUPED], ids=["single", "grouped"])
def test_the_learners_are_those_of_a_run_in_which_the_rounds_were_quarantined(tmp_path: Path, settings: Any) -> None:
    run, other = make_run(tmp_path / "run", settings), RunFiles(tmp_path / "other")
    shutil.copytree(run.history, other.history, ignore=lambda *_: ["plans.jsonl", "paths.jsonl", "quarantine.jsonl"])
    (done,) = forget_entity(run.folder, KEY)
    assert done.learned == {"main": 3 if settings is KEEPING else 0}
    assert list_checkpoints(run.checkpoints) == ([3] if settings is KEEPING else [])
    if settings is GROUPED:  # Timing decides which rounds share an update.
        shutil.copy(run.update_log, other.update_log)
    with closing(QuarantineLog(other.quarantine_log, "")) as log:
        log.add(make_quarantine(t, 0, "operator", "x") for t in OWN)
    assert play_on(run, settings) == play_on(other, settings)
    assert [line["round"] for line in lines(run.folder) if line["skipped"]] == list(OWN)
    for mine, theirs in zip(lines(run.folder), lines(other.folder), strict=True):
        assert mine["learners"] == theirs["learners"]


def describe(files: RunFiles) -> list[Any]:
    """Return what the files of a run say that its next start continues from."""
    reader = QuarantineReader(files.quarantine_log)
    reader.refresh()
    quarantined = [one._replace(timestamp=0.0) for one in reader.by_round.values()]
    plans = files.update_log.read_text()
    return [lines(files.folder), quarantined, plans, list_checkpoints(files.checkpoints), *os.listdir(files.folder)]


@pytest.mark.parametrize("point", STEPS)
def test_an_erasure_that_is_killed_is_completed_by_the_next_start(run: RunFiles, erased: RunFiles, point: str) -> None:
    pid = os.fork()
    if not pid:  # A process of its own, so that nothing is closed or rolled back in order.
        forget_entity(run.folder, KEY, lambda step: os._exit(9) if step == point else None)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    with closing(History.open(run.history, write=True)) as history:
        assert [one.rounds for one in apply_erasures(history, run.folder)] == ([] if point == "complete" else [OWN])
    assert find_traces(run.folder, KEY, MARK, TRACES) == []
    assert forget_entity(run.folder, None) == []
    assert describe(run) == describe(erased)
    assert verify(run.history).clean


@pytest.mark.parametrize("accesses", range(3, 60, 8))
def test_an_erasure_that_is_killed_in_any_step_is_completed(run: RunFiles, erased: RunFiles, accesses: int) -> None:
    pid = os.fork()
    if not pid:
        die_at(accesses)
        forget_entity(run.folder, KEY)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) in (0, -signal.SIGKILL)
    forget_entity(run.folder, None if list_logs(run.history)[0].exists() else KEY)
    assert find_traces(run.folder, KEY, MARK, TRACES) == []
    assert describe(run) == describe(erased)


def test_the_log_says_when_and_which_rounds_and_names_nobody(run: RunFiles) -> None:
    (done,) = forget_entity(run.folder, KEY)
    for path in list_logs(run.history):
        (line,) = [json.loads(text) for text in path.read_text().splitlines()]
        assert line["event"] == "forget"
        assert line["rounds"] == list(OWN)
        assert line["digest"] == done.erasure.digest
        assert line["timestamp"] > 1e9
        assert "Caf" not in path.read_text()


def test_a_restored_backup_is_erased_again(run: RunFiles, tmp_path: Path) -> None:
    backup = tmp_path / "backup"
    shutil.copytree(run.folder, backup)
    forget_entity(run.folder, KEY)
    learned = play_on(run)
    shutil.rmtree(run.folder)
    shutil.copytree(backup, run.folder)
    with History.open(run.history, write=True) as history:
        assert len(list_pending(history)) == 1
        assert [one.rounds for one in apply_erasures(history, run.folder)] == [OWN]
    assert find_traces(run.folder, KEY, MARK, TRACES) == []
    assert play_on(run) == learned


def test_checkpoints_that_alone_are_restored_are_forgotten_again(run: RunFiles, tmp_path: Path) -> None:
    backup = shutil.copytree(run.checkpoints, tmp_path / "backup")
    forget_entity(run.folder, KEY)
    learned = play_on(run)
    with closing(History.open(run.history, write=True)) as history:
        assert apply_erasures(history, run.folder) == []
    shutil.rmtree(run.checkpoints)
    shutil.copytree(backup, run.checkpoints)
    with closing(History.open(run.history, write=True)) as history:
        (done,) = apply_erasures(history, run.folder)
    assert (done.rounds, done.learned) == ((), {"main": 3})
    assert list_checkpoints(run.checkpoints) == [3]
    assert play_on(run) == learned
    assert load_checkpoint(run.checkpoints / str(ROUNDS - 2)).erasures == 1


def test_the_same_tasks_are_not_taken_again_and_leave_no_letter(run: RunFiles) -> None:
    forget_entity(run.folder, KEY)
    spec = TaskSpec(x_shape=(2,), y="class", ways=3)
    with History.open(run.history, write=True) as history:
        letters = DeadLetters(run.dead_letters, 10, 1 << 20)
        ingest = Ingest(history, spec, Limits(), lambda: ROUNDS, lambda *_: None, lambda *_: None, dead_letters=letters)
        with closing(ingest):
            again = Arrival(id_of(4), record(4).payload, "shops", None)
            assert ingest.submit_nowait(again) is None
            with pytest.raises(Rejected, match="forgotten"):
                ingest.submit(again, wait=False)
            new = ingest.submit(again._replace(id=make_entity_id("shops", KEY, "later")), wait=False).result()
            assert new == Receipt(new.id, ROUNDS, duplicate=False)
    assert [letter["id"] for _, letter in read_letters(run.dead_letters)] == [id_of(0)]


def test_rounds_that_retention_has_removed_are_quarantined_where_they_would_be_learned_again(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", SETTINGS)
    with History.open(run.history, write=True) as history:
        assert subsample(history, RetentionSettings(rounds=8))
        assert compact(history, ROUNDS, 5)
        removed = [t for t in range(ROUNDS) if not history.query("SELECT 1 FROM held WHERE round = ?", (t,))]
    (done,) = forget_entity(run.folder, KEY)
    assert done.learned == {"main": 0}
    play_on(run, SETTINGS)
    skipped = {line["round"] for line in lines(run.folder) if line["skipped"]}
    assert skipped == {*OWN, *removed}
    reader = QuarantineReader(run.quarantine_log)
    reader.refresh()
    assert {one.reason for one in reader.by_round.values()} == {"forgotten"}


def test_an_unknown_key_and_a_run_in_use_are_refused(run: RunFiles, cli: Cli) -> None:
    unknown = cli("forget", run.folder, "nobody")
    assert unknown.code == 78
    assert "nothing of an entity 'nobody'" in unknown.err.replace("\n", " ")
    with History.open(run.history, write=True):
        busy = cli("forget", run.folder, KEY)
    assert busy.code == 75
    assert "stop the daemon" in busy.err.replace("\n", " ")
    assert cli("forget", run.folder / "history", KEY).code == 78


def test_the_command_says_what_it_did_and_what_still_names_the_entity(run: RunFiles, cli: Cli) -> None:
    (run.folder / "notes.txt").write_text(f"see {id_of(4)}")
    ended = cli("forget", run.folder, KEY)
    assert ended.code == 70
    assert "notes.txt" in ended.err
    assert "erased 4 rounds, from 4 to 14: the next start of main learns again from round 3 on" in ended.out
    assert "no erasure is left to complete" in cli("forget", run.folder).out
