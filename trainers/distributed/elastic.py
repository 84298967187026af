"""Start the ranks of one node through torch's elastic agent, and start them all again when one dies."""

import contextlib
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from types import FrameType

import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from trainers.settings import EngineSettings

MAX_RESTARTS = 1_000_000
GRACE_SECONDS = 2.0
STOPPED_SECONDS = 3.0
POLL_SECONDS = 0.1
RUN_ID = "online-meta"
"""What torchrun is told on the other machines as --rdzv-id."""

RENDEZVOUS = {"is_host": True, "join_timeout": 10**8, "last_call_timeout": 5, "keep_alive_interval": 2}
"""A machine that is missing may come back after days; one that says nothing for three intervals is gone."""


def launch_ranks(settings: EngineSettings, command: Sequence[str], restarted: Callable[[int], None]) -> bool:
    """Run ``command`` as this machine's ranks until all have ended well; return whether they were told to.

    Whenever they are started ``restarted`` is called with how often that was again: 0 at first. torch's own count
    knows nothing of the times when another machine came or left.

    SIGTERM and SIGINT are passed on to the ranks, which drain. When one dies, all are started again; a rank that
    outlives another by ``GRACE_SECONDS``, because it hangs, is killed, so that the new ones need not wait for it; so is
    one that is stopped for some seconds. Where other machines take part this one, where they meet,
    has to be there from the beginning to the end.
    """
    # Restarts need it: the agent would else keep the port of the store that died with the ranks.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    draining = threading.Event()

    def drain(signal_number: int, _frame: FrameType | None) -> None:
        draining.set()
        for rank in _ranks():
            rank.send_signal(signal_number)

    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, drain)
    threading.Thread(
        target=_kill_stale_ranks,
        args=(min(settings.timeout_seconds, STOPPED_SECONDS), draining, restarted),
        name="bury-ranks",
        daemon=True,
    ).start()
    try:
        elastic_launch(_config(settings), command[0])(*command[1:])
    except ChildFailedError:
        return False
    return draining.is_set()


def _config(settings: EngineSettings) -> LaunchConfig:
    min_nodes, max_nodes = settings.nodes
    single_node = max_nodes == 1
    return LaunchConfig(
        min_nodes=min_nodes,
        max_nodes=max_nodes,
        nproc_per_node=settings.processes,
        run_id=str(uuid.uuid4()) if single_node else RUN_ID,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0" if single_node else settings.rendezvous,
        rdzv_configs={} if single_node else RENDEZVOUS,
        local_addr=None if single_node else settings.rendezvous.rpartition(":")[0],
        max_restarts=MAX_RESTARTS,
        signals_to_handle="SIGQUIT",  # The agent would not wait for the ranks to drain.
    )


def _ranks() -> list[psutil.Process]:
    return psutil.Process().children()


def _kill_stale_ranks(stopped_seconds: float, draining: threading.Event, restarted: Callable[[int], None]) -> None:
    """Ranks end together or not at all: kill those that go on when another is gone, and those that are stopped.

    Those that begin when none from before is there are ``restarted``, but for the first. Ranks that are started again
    while draining would never end: with them, this process does.
    """
    started_together: set[int] = set()
    starts = 0
    broken, stopped = _ConditionTimer(GRACE_SECONDS), _ConditionTimer(stopped_seconds)
    while True:
        status = _status_of_ranks()
        if draining.is_set() and not status.keys() <= started_together:
            _kill(status)
            os._exit(os.EX_TEMPFAIL)
        alive = started_together & status.keys()
        if status and not alive:
            restarted(starts)
            starts += 1
        if not alive or alive == started_together:
            started_together = alive = set(status)
        if broken.fires(alive < started_together):
            _kill(alive)
        suspended = {pid for pid in alive if status[pid] == psutil.STATUS_STOPPED}
        if stopped.fires(bool(suspended)):
            _kill(suspended)
        time.sleep(POLL_SECONDS)


def _kill(ranks: Iterable[int]) -> None:
    for pid in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class _ConditionTimer:
    """Ends once something has been wrong for so many ``seconds`` on end."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._since = seconds, time.monotonic()

    def fires(self, holds: bool) -> bool:
        now = time.monotonic()
        self._since = self._since if holds else now
        return now - self._since > self._seconds


def _status_of_ranks() -> dict[int, str]:
    """Return what each rank that is alive does, by its process id."""
    found = {}
    for rank in _ranks():
        with contextlib.suppress(psutil.NoSuchProcess):
            found[rank.pid] = rank.status()
    return {pid: status for pid, status in found.items() if status != psutil.STATUS_ZOMBIE}
