"""Start the ranks of one machine with torch's elastic agent, and restart all of them when one dies."""

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
"""The value of torchrun's option ``--rdzv-id`` on the other machines."""

RENDEZVOUS = {"is_host": True, "join_timeout": 10**8, "last_call_timeout": 5, "keep_alive_interval": 2}
"""A missing machine may join after days; a machine that is silent for three intervals counts as lost."""


def launch_ranks(settings: EngineSettings, command: Sequence[str], restarted: Callable[[int], None]) -> bool:
    """Run ``command`` as this machine's ranks until all of them end without an error.

    SIGTERM and SIGINT are forwarded to the ranks, which then drain. When one rank dies, all are restarted. A rank that
    outlives another one by ``GRACE_SECONDS``, because it hangs, is killed so that the new ranks need not wait for it.
    A rank that is suspended for some seconds is killed, too. With several machines, this one hosts the rendezvous and
    must be up all the time.

    Args:
        settings: [engine] section of the configuration.
        command: command line of a rank.
        restarted: called at each start of the ranks with the number of restarts so far, 0 at the first start. torch's
            own count excludes restarts that are due to another machine that joins or leaves.

    Returns:
        Whether the ranks ended because of a signal.
    """
    # Needed for restarts: otherwise the agent keeps the port of the store that ended with the ranks.
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
        signals_to_handle="SIGQUIT",  # For SIGTERM the agent would not wait until the ranks have drained.
    )


def _ranks() -> list[psutil.Process]:
    return psutil.Process().children()


def _kill_stale_ranks(stopped_seconds: float, draining: threading.Event, restarted: Callable[[int], None]) -> None:
    """Kill ranks that continue although another one has ended, and ranks that are suspended.

    Calls ``restarted`` when new ranks start and none of the previous ones is left. If ranks are restarted while
    draining, they would never end; they are killed and this process exits.
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
    """A timer that fires after a condition has held for ``seconds`` without a break."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._since = seconds, time.monotonic()

    def fires(self, holds: bool) -> bool:
        now = time.monotonic()
        self._since = self._since if holds else now
        return now - self._since > self._seconds


def _status_of_ranks() -> dict[int, str]:
    """Return the process status of each live rank by its process id."""
    found = {}
    for rank in _ranks():
        with contextlib.suppress(psutil.NoSuchProcess):
            found[rank.pid] = rank.status()
    return {pid: status for pid, status in found.items() if status != psutil.STATUS_ZOMBIE}
