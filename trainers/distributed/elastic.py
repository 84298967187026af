"""Start the ranks of one machine with torch's elastic agent, and restart all of them when one dies."""

import contextlib
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import FrameType

import psutil
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException

from trainers.distributed.rendezvous import HostingMachine, JoiningMachine, OneMachine, Rendezvous
from trainers.settings import EngineSettings

MAX_RESTARTS = 1_000_000
GRACE_SECONDS = 2.0
STOPPED_SECONDS = 3.0
POLL_SECONDS = 0.1
END_SECONDS = 30.0
"""How long a machine whose ranks have ended waits for the ranks of the others."""


def launch_ranks(
    settings: EngineSettings, command: Sequence[str], restarted: Callable[[int], None], folder: Path
) -> bool:
    """Run ``command`` as the ranks of the daemon's machine until all of them end without an error.

    SIGTERM and SIGINT are forwarded to the ranks, which then drain. When one rank dies, all are restarted. A rank that
    outlives another one by ``GRACE_SECONDS``, because it hangs, is killed so that the new ranks need not wait for it.
    A rank that is suspended for some seconds is killed, too. With several machines, this one hosts the rendezvous and
    must be up all the time.

    Args:
        settings: [engine] section of the configuration.
        command: command line of a rank.
        restarted: called at each start of the ranks with the number of restarts so far, 0 at the first start. torch's
            own count excludes restarts that are due to another machine that joins or leaves.
        folder: for the files of the rendezvous; it is emptied, and no other user can open it.

    Returns:
        Whether the ranks ended because of a signal.

    Raises:
        OSError: if the address of the rendezvous does not belong to this machine, or its port is in use.
    """
    draining = threading.Event()

    def drain(signal_number: int, _frame: FrameType | None) -> None:
        draining.set()
        for rank in _ranks():
            rank.send_signal(signal_number)

    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, drain)
    _make_private(folder)
    rendezvous = (
        OneMachine(folder)
        if settings.nodes[1] == 1
        else HostingMachine(settings.rendezvous, settings.nodes, draining.is_set)
    )
    # For SIGTERM the agent would not wait until the ranks have drained.
    succeeded = _run_agent(settings, command, rendezvous, folder, draining, restarted, "SIGQUIT")
    return succeeded and draining.is_set()


def join_ranks(settings: EngineSettings, command: Sequence[str], folder: Path) -> bool:
    """Run ``command`` as the ranks of a machine that joins the run of the daemon at ``settings.rendezvous``.

    SIGTERM, SIGINT and SIGHUP end the ranks at once; those of the other machines then continue without them.

    Args:
        settings: [engine] section of the configuration.
        command: command line of a rank.
        folder: for the files of the agent; it is emptied.

    Returns:
        Whether the ranks ended without an error, or because of a signal.

    Raises:
        RuntimeError: if the daemon's machine cannot be reached, or ends the rendezvous.
    """
    _make_private(folder)
    rendezvous = JoiningMachine(settings.rendezvous)
    try:
        return _run_agent(
            settings, command, rendezvous, folder, threading.Event(), lambda _: None, "SIGTERM,SIGINT,SIGHUP,SIGQUIT"
        )
    except SignalException:
        return True


def _make_private(folder: Path) -> None:
    """Make an empty folder that no other user can open."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, parents=True)


def _run_agent(
    settings: EngineSettings,
    command: Sequence[str],
    rendezvous: Rendezvous,
    folder: Path,
    draining: threading.Event,
    restarted: Callable[[int], None],
    signals: str,
) -> bool:
    """Run torch's agent until its ranks have ended; return whether they ended without an error."""
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = signals
    threading.Thread(
        target=_kill_stale_ranks,
        args=(min(settings.timeout_seconds, STOPPED_SECONDS), draining, restarted),
        name="bury-ranks",
        daemon=True,
    ).start()
    agent = LocalElasticAgent(
        WorkerSpec(
            role="trainer",
            local_world_size=settings.processes,
            rdzv_handler=rendezvous,
            entrypoint=command[0],
            args=tuple(command[1:]),
            max_restarts=MAX_RESTARTS,
        ),
        DefaultLogsSpecs(log_dir=str(folder / "logs")),
        exit_barrier_timeout=END_SECONDS,
    )
    try:
        result = agent.run()
    finally:
        rendezvous.shutdown()
    if result is None:  # The run ended while the agent waited for machines: there was no rank that could drain.
        sys.exit(os.EX_TEMPFAIL)
    return not result.is_failed()


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
