"""An acknowledged round is durable: under kill -9 at random moments, at every point of a commit, and with torn logs."""

import multiprocessing
import os
import random
import shutil
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from streams.history import ledger
from streams.history.history import History
from streams.history.verify import verify
from tests.support import appending

START = multiprocessing.get_context("forkserver")
START.set_forkserver_preload(["streams.history.history"])

Said = list[tuple[str, int, bool]]


def start(target: object, *arguments: object) -> tuple[multiprocessing.Process, Connection]:
    here, there = START.Pipe(duplex=False)
    process = START.Process(target=target, args=(*arguments, there), daemon=True)
    process.start()
    there.close()
    return process, here


def receive_all(connection: Connection) -> Said:
    """Return everything received before the end; a message that the kill cut off does not count."""
    said: Said = []
    try:
        while True:
            said.extend(connection.recv())
    except (EOFError, OSError):
        return said


def check(folder: Path, seed: int, said: Said) -> int:
    """Check the guarantees; return the number of rounds."""
    with History.open(folder, write=False) as history:
        rounds = len(history)
        ids = [history.entry(round).id for round in range(rounds)]
        assert len(set(ids)) == rounds
        for id, round, _ in said:
            assert ids[round] == id
        for round, id in enumerate(ids):
            _, of, number = id.split("-")
            assert history.payload(round) == appending.payload(int(of), int(number))
        mine = [int(id.split("-")[2]) for id in ids if id.startswith(f"t-{seed}-")]
        assert mine == list(range(len(mine))), "the history is a prefix of what was sent, in order"
        if mine:
            assert history.cursor("s") == str(mine[-1])
    found = verify(folder)
    assert (found.rounds, found.gaps, found.missing, found.stray, found.ids) == (rounds, (), (), (), ())
    assert found.structure == ()
    return rounds


def test_kills_at_random_moments_lose_no_acknowledged_round(tmp_path: Path) -> None:
    chance = random.Random(20)
    before = acknowledged = 0
    for seed in range(14):
        process, connection = start(appending.append_forever, str(tmp_path), seed)
        first = connection.recv()
        wait = chance.uniform(0.0, 0.25)
        process.join(wait)  # the process never ends by itself, so this is a random moment
        os.kill(process.pid or 0, signal.SIGKILL)
        said = [*first, *receive_all(connection)]
        process.join()
        assert process.exitcode == -signal.SIGKILL
        rounds = check(tmp_path, seed, said)
        assert rounds >= before + len({id for id, _, _ in said})
        before, acknowledged = rounds, acknowledged + len(said)
    assert acknowledged > 100


POINTS = [
    ("BEGIN", 1, False),
    ("BEGIN", 1, True),
    ("INSERT INTO rounds", 1, False),
    ("INSERT INTO rounds", 1, True),
    ("INSERT INTO payloads", 1, True),
    ("COMMIT", 1, False),
    ("COMMIT", 1, True),
]


@pytest.mark.parametrize(("word", "count", "after"), POINTS)
def test_a_commit_is_atomic_wherever_it_is_killed(tmp_path: Path, word: str, count: int, after: bool) -> None:
    process, connection = start(appending.die_at, str(tmp_path), word, count, after)
    said = receive_all(connection)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [round for _, round, _ in said] == list(range(5))
    assert check(tmp_path, 0, said) == (9 if (word, after) == ("COMMIT", True) else 5)
    with History.open(tmp_path, write=True) as history:
        answers = history.append([appending.record(0, n) for n in range(9)])
    assert [answer.round for answer in answers] == list(range(9))
    assert check(tmp_path, 0, []) == 9


def test_a_torn_log_keeps_every_complete_commit(tmp_path: Path) -> None:
    """A power loss may drop any part of the last writes, but synced data is there."""
    folder, torn = tmp_path / "whole", tmp_path / "torn"
    files = (ledger.FILE, f"{ledger.FILE}-wal")
    chance = random.Random(5)
    with History.open(folder, write=True) as history:
        synced = [(0, 0)]  # (bytes of the log, rounds) after each commit
        for first in range(0, 24, 3):
            history.append([appending.record(0, n) for n in range(first, first + 3)])
            synced.append(((folder / files[1]).stat().st_size, len(history)))
        images = {name: (folder / name).read_bytes() for name in files}
    for _ in range(40):
        cut = chance.randint(0, len(images[files[1]]))
        torn.mkdir()
        (torn / files[0]).write_bytes(images[files[0]])
        log = bytearray(images[files[1]][:cut])
        if chance.random() < 0.5 and cut > 40_000:  # a hole, as from a lost page
            hole = chance.randint(1, cut - 4_096)
            log[hole : hole + 4_096] = bytes(4_096)
            cut = hole
        (torn / files[1]).write_bytes(log)
        safe = max(rounds for size, rounds in synced if size <= cut)
        with History.open(torn, write=True) as history:
            assert len(history) >= safe
            assert len(history) % 3 == 0
            history.append([appending.record(0, n) for n in range(len(history), 24)])
        assert check(torn, 0, [(f"t-0-{n}", n, False) for n in range(24)]) == 24
        shutil.rmtree(torn)
