"""What a child process of the daemon does at its start: die with its parent, stop on SIGTERM, run alone."""

import _thread
import ctypes
import fcntl
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

from deploy.exits import TRY_LATER, CommandError

LOCK_TIMEOUT_SECONDS = 30.0
PR_SET_PDEATHSIG = 1


def stop_on_signals() -> Event:
    """Return an event that SIGTERM and SIGINT set.

    Another thread sets it: the signal may come while this one waits for the event and holds the event's own lock, and
    would then wait for itself for ever.
    """
    stop = Event()

    def set_stop(_signal: int, _frame: object) -> None:
        _thread.start_new_thread(stop.set, ())

    signal.signal(signal.SIGTERM, set_stop)
    signal.signal(signal.SIGINT, set_stop)
    return stop


def die_with_parent() -> None:
    """End this process as soon as the parent's end of standard input closes, as it does when the parent dies.

    A killed daemon cannot stop its children, and an orphan trainer would play the same rounds as its successor. So
    this process is killed, too, when its own parent ends, which for a rank is the agent that started it; Linux does so
    even where it is stopped. One that was started by hand has no pipe for standard input.
    """

    def watch_daemon() -> None:
        while os.read(sys.stdin.fileno(), 1):  # Unbuffered: a buffer's lock would block the interpreter's end.
            pass
        os._exit(TRY_LATER)

    if stat.S_ISFIFO(os.fstat(sys.stdin.fileno()).st_mode):
        threading.Thread(target=watch_daemon, name="die-with-daemon", daemon=True).start()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def hold_lock(lock: Path) -> Iterator[None]:
    """Hold ``lock`` for the time of the block: only one process of a kind works on a run.

    Waits for a predecessor that is still dying; raises ``CommandError`` when it lives on.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as file:
        deadline = time.monotonic() + LOCK_TIMEOUT_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise CommandError(
                        TRY_LATER, f"{lock} is held by another process: is this run served already?"
                    ) from None
                time.sleep(0.05)
        yield
