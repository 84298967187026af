"""Fill a full disk, free some space, and continue. Run by test_history_full.py.

There are two kinds: ``tmpfs FOLDER`` (a mounted disk of a few MB, ENOSPC) and ``limit FOLDER`` (RLIMIT_FSIZE, EFBIG).
"""

import resource
import sys
from collections.abc import Callable
from pathlib import Path

from streams.history.errors import HistoryFull
from streams.history.history import History
from streams.history.verify import verify
from tests.support.appending import record

SEED = 3
AT_ONCE = 6


def fill(history: History) -> int:
    """Append until the disk is full; return how many rounds were acknowledged."""
    kept = len(history)
    while True:
        batch = [record(SEED, n) for n in range(kept, kept + AT_ONCE)]
        try:
            answers = history.append(batch)
        except HistoryFull:
            return kept
        assert [answer.round for answer in answers] == list(range(kept, kept + AT_ONCE))
        kept += AT_ONCE


def check(history: History, kept: int) -> None:
    assert len(history) == kept
    assert history.find(f"t-{SEED}-{kept}") is None
    assert history.cursor("s") == str(kept - 1)
    for round in range(kept):
        assert history.payload(round) == record(SEED, round).payload


def fill_and_recover(folder: str, free: Callable[[], None]) -> None:
    with History.open(folder, write=True) as history:
        kept = fill(history)
        assert kept > AT_ONCE
        check(history, kept)
        again = fill(history)
        assert again >= kept
        check(history, again)
        free()
        answers = history.append([record(SEED, n) for n in range(again + 2 * AT_ONCE)])
        assert [answer.round for answer in answers] == list(range(again + 2 * AT_ONCE))
        assert [answer.duplicate for answer in answers] == [True] * again + [False] * 2 * AT_ONCE
        check(history, again + 2 * AT_ONCE)
    found = verify(folder)
    assert (found.gaps, found.missing, found.stray, found.ids, found.structure) == ((), (), (), (), ())
    with History.open(folder, write=True) as history:
        check(history, again + 2 * AT_ONCE)


def fill_tmpfs(folder: str) -> None:
    ballast = Path(folder, "ballast")
    ballast.write_bytes(bytes(8_000_000))
    fill_and_recover(folder, ballast.unlink)


def fill_limit(folder: str) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, hard))  # Python ignores SIGXFSZ: the write fails
    fill_and_recover(folder, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard)))


if __name__ == "__main__":
    {"tmpfs": fill_tmpfs, "limit": fill_limit}[sys.argv[1]](sys.argv[2])
    print("ok")
