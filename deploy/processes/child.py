"""Set up a child process of the daemon: end with its parent, stop on SIGTERM, hold a lock against a second process."""

import _thread
import ctypes
import fcntl
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

from deploy.exits import TRY_LATER, CommandError

LOCK_TIMEOUT_SECONDS = 30.0
PR_SET_PDEATHSIG = 1
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES, MAPPED_BYTES = 1 << 30, 1 << 25
"""Freed memory at the end of the heap that a process keeps, and the size from which a tensor is not in the heap."""


FINISH = signal.SIGUSR1
"""Asks the comparators to judge the newest round and to end, while the daemon drains."""


def stop_on_signals(finish: Event | None = None) -> Event:
    """Install handlers for SIGTERM and SIGINT; return the event that they set. SIGHUP is ignored.

    ``FINISH`` sets the event ``finish``, if there is one, and then the same.

    A terminal that closes sends SIGHUP to all processes. The daemon then drains, and stops its children in order.

    A new thread sets the event. The main thread may hold the event's lock when the signal arrives, so that a handler
    which set the event itself would deadlock.
    """
    stop = Event()

    def set_stop(_signal: int, _frame: object) -> None:
        _thread.start_new_thread(stop.set, ())

    def set_both(finish: Event) -> None:
        finish.set()
        stop.set()

    if finish is not None:
        signal.signal(FINISH, lambda *_: _thread.start_new_thread(set_both, (finish,)))
    signal.signal(signal.SIGTERM, set_stop)
    signal.signal(signal.SIGINT, set_stop)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    return stop


def die_with_parent() -> None:
    """End this process when the daemon or the direct parent process ends.

    A killed daemon cannot stop its children, and an orphaned trainer would play the same rounds as its successor. The
    daemon's end is detected by the end of standard input, if that is a pipe; it is not one if a user started the
    process. On Linux, the kernel also kills this process when its direct parent ends (for a rank, the agent that
    started it), even if this process is stopped.
    """

    def watch_daemon() -> None:
        while os.read(sys.stdin.fileno(), 1):  # Unbuffered: the lock of a buffer would block interpreter exit.
            pass
        os._exit(TRY_LATER)

    if stat.S_ISFIFO(os.fstat(sys.stdin.fileno()).st_mode):
        threading.Thread(target=watch_daemon, name="die-with-daemon", daemon=True).start()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def keep_freed_memory() -> None:
    """Let this process keep the memory of freed tensors for the next ones, up to ``KEPT_BYTES``.

    A meta-step frees activations and allocates the same ones again. The C library of Linux gives megabytes back to the
    system each time, which fills them with zeros again: a fifth of the time of a small convolutional network. Other C
    libraries are left as they are.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is not None:
        set_option(M_TRIM_THRESHOLD, KEPT_BYTES)
        set_option(M_MMAP_THRESHOLD, MAPPED_BYTES)


@contextmanager
def hold_lock(lock: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file ``lock`` during the block, so that one process of a kind works on a run.

    Waits up to ``LOCK_TIMEOUT_SECONDS`` for a predecessor that is still ending.

    Raises:
        CommandError: with exit code 75 if another process holds the lock for longer.
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
                        TRY_LATER, f"{lock} is held by another process: does another daemon serve this run?"
                    ) from None
                time.sleep(0.05)
        yield


def wait_for_lock(lock: Path, on_waiting: Callable[[], None]) -> None:
    """Wait until no process holds ``lock`` by ``hold_lock``; call ``on_waiting`` several times a second meanwhile."""
    with open(lock, "a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                on_waiting()
                time.sleep(0.05)
