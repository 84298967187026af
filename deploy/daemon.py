"""The daemon: accept tasks, supervise the trainer and the comparators, serve the HTTP API, drain on a signal."""

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import uvicorn
import uvloop
from prometheus_client import CollectorRegistry

from deploy.checks.model import list_scored
from deploy.checks.preflight import check_learning, check_rendezvous, error_context, open_sources
from deploy.checks.run_folder import adopt_run_defaults, check_same_run, check_tasks, open_history
from deploy.checks.trial import make_trial
from deploy.config.config import Config
from deploy.erasure import apply_erasures
from deploy.exits import BROKEN, DONE, TRY_LATER, CommandError
from deploy.leader import Adapter
from deploy.processes.branches import ForkSupervisor, start_child
from deploy.processes.child import FINISH
from deploy.processes.maintenance import MaintenanceSupervisor
from deploy.processes.supervisor import SupervisedProcess
from deploy.promotion import Settled, settle_branches, write_branches
from deploy.reports.report import write_report
from deploy.server.answering import AnsweringProcess
from deploy.server.app import create_app, create_probe_app
from deploy.server.limits import allow_descriptors, make_bounded_protocol
from deploy.server.listener import ProbeServer, bind, bind_probes, check_exposure
from deploy.server.state import DaemonState
from deploy.telemetry.metrics import Instruments
from deploy.telemetry.monitor import ArchiveMonitor, HealthMonitor
from deploy.telemetry.process_monitor import ProcessMonitor, reset_heartbeats
from deploy.telemetry.prometheus import make_instruments, start_metrics
from deploy.telemetry.ranks_view import RanksView
from deploy.telemetry.run_view import Scored, open_view
from online_meta.types import Task
from streams.history.erasure import list_erased
from streams.history.history import History
from streams.history.maintenance import reach_archive
from streams.ingest.dead_letters import DeadLetters
from streams.ingest.ingest import Ingest
from streams.ingest.source_reader import LagMonitor
from streams.segmenting.by_entity import EntitySource
from streams.types import Gap, SavesState, TaskSource
from trainers.journal.fork_log import read_branches
from trainers.journal.run_files import RunFiles

REFRESH_SECONDS = 0.2
SIGNAL_SECONDS = 0.1
DRAIN_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
REQUEST_SECONDS = 10.0
"""How long a drain waits for HTTP requests in progress."""
COMPARATOR_SECONDS = 12.0
"""How long a drain waits for the comparators once the trainer has ended. Killing them loses nothing."""
OVERDUE_SECONDS = 30.0
"""How long after the deadline the daemon ends even if it is stuck, for example in the disconnection of a source."""
RETRY_SECONDS = 5.0
log = logging.getLogger(__name__)


class Drain:
    """The drain of a daemon, which has one deadline for everything.

    Args:
        seconds: until the deadline, from ``begin`` on.
    """

    def __init__(self, seconds: float) -> None:
        """Do not wait for signals yet."""
        self.requested = False
        self.undrained = ""
        self.on_begin: list[Callable[[], None]] = []
        self._seconds, self._deadline = seconds, math.inf
        self._ended = Event()
        self._handlers: dict[signal.Signals, Any] = {}

    def wait_for_signals(self) -> None:
        """Let ``DRAIN_SIGNALS`` set ``requested``; none of them ends this process until ``end``."""
        # With nohup, SIGHUP is ignored: the daemon then outlives its terminal.
        kinds = [kind for kind in DRAIN_SIGNALS if signal.getsignal(kind) is not signal.SIG_IGN]
        self._handlers = {kind: signal.signal(kind, self._request) for kind in kinds}

    def _request(self, _signal: int, _frame: object) -> None:
        self.requested = True

    def add(self, name: str, children: dict[str, SupervisedProcess]) -> None:
        """Ask the child ``name`` to stop when the drain begins, and comparators to judge the newest round."""

        def stop() -> None:
            if (child := children.get(name)) is not None:
                child.ask_to_stop(FINISH if name == "comparators" else signal.SIGTERM)

        self.on_begin.append(stop)

    def begin(self) -> None:
        """Start the time, and call the functions in ``on_begin``; does nothing if it has begun."""
        if self._deadline < math.inf:
            return
        self._deadline = time.monotonic() + self._seconds
        log.info("draining, for at most %g s", self._seconds)
        threading.Thread(target=self._end_if_stuck, name="drain-deadline", daemon=True).start()
        for stop in self.on_begin:
            stop()

    def seconds_left(self) -> float:
        """Return the seconds until the deadline, at least 0."""
        self.begin()
        return max(self._deadline - time.monotonic(), 0.0)

    def end(self) -> None:
        """Restore the handlers of the signals."""
        self._ended.set()
        for kind, handler in self._handlers.items():
            signal.signal(kind, handler)

    def _end_if_stuck(self) -> None:
        if not self._ended.wait(self._seconds + OVERDUE_SECONDS):
            log.critical("the drain is stuck; the daemon ends without a report, and the next start loses nothing")
            os._exit(TRY_LATER)


def serve(config: Config, ready: Callable[[str], None]) -> None:
    """Run the daemon until SIGTERM, SIGINT or SIGHUP, then drain it.

    Draining stops comparators and compilers first. It stops intake, commits pending tasks, finishes the round and
    writes a checkpoint. The comparators then judge the newest round without training, and the report is written. All of
    this has one deadline, ``[serve] drain_seconds``.

    Args:
        config: of the run.
        ready: called with the daemon's URL once it listens.

    Raises:
        CommandError: if the daemon cannot start, the trainer did not drain, the report cannot be written, or the
            trainer cannot continue. Configuration errors are raised before a file is written or a process is started.
    """
    drain = Drain(config.serve.drain_seconds)
    try:
        _serve(config, ready, drain)
    finally:
        drain.end()


def _serve(config: Config, ready: Callable[[str], None], drain: Drain) -> None:
    token = check_exposure(config.serve)
    own = adopt_run_defaults(config, RunFiles(Path(config.run.path)))
    settled = settle_branches(own, read_branches(Path(config.run.path)))
    config, files = settled.config, settled.files
    context = check_learning(config)
    check_rendezvous(config.engine)
    allow_descriptors(config.serve.limits)
    children: dict[str, SupervisedProcess] = {}
    with ExitStack() as cleanup:
        listener = cleanup.enter_context(contextlib.closing(bind(config.serve)))
        probes = cleanup.enter_context(contextlib.closing(ProbeServer(bind_probes(config.serve), config.serve.limits)))
        history = cleanup.enter_context(open_history(files, config.history))
        for one in apply_erasures(history, files.folder):
            log.warning("completed the erasure %s", one)
        check_tasks(history, config.task, files.history)
        check_same_run(config, files)
        sources = open_sources(config, history)
        write_branches(settled)
        drain.wait_for_signals()
        trial, scored = make_trial(config, context), list_scored(config, context)
        del context  # it holds a model
        forks = ForkSupervisor(own, settled, children, config.serve.drain_seconds / 2)
        cleanup.callback(forks.close, drain.seconds_left)
        state = make_state(config, files, history, token, cleanup, drain, children, trial, scored)
        state.forks = forks
        state.tables = {name: source for name, source in sources.items() if isinstance(source, EntitySource)}
        state.refresh()
        upkeep = cleanup.enter_context(contextlib.closing(MaintenanceSupervisor(history, config, files)))
        drain.on_begin.append(upkeep.ask_to_stop)
        for name, source in sources.items():
            if isinstance(source, SavesState):
                with error_context(f"[[source]] {name}:"):
                    source.save_in(files.sources, list_erased(history, name))
            if source is not None:
                state.ingest.pull(name, source)
        cleanup.callback(_watch_lag(state, sources).close)
        archive = cleanup.enter_context(contextlib.closing(ArchiveMonitor(lambda: reach_archive(history))))
        make_monitor = partial(HealthMonitor, state, sources=sources, archive=archive, forks=forks.look)
        follow = partial(_monitor_branch, state, children, upkeep, make_monitor)
        follow(settled)
        _refresh(state)
        forks.start(state.serve_branch, follow, state.broken.set)
        drain.on_begin.append(forks.ask_to_stop)
        probes.start(create_probe_app(state))
        _run_server(state, listener, lambda: ready(_url(config, listener)), drain)
    state.view.refresh()
    state.view.close()
    try:
        write_report(files.folder, state.view, state.config)
    except OSError as error:
        raise CommandError(
            TRY_LATER, f"drained, but {files.folder / 'report.json'} could not be written: {error}"
        ) from error
    if state.broken.is_set():
        raise CommandError(BROKEN, "drained, because the trainer cannot continue: see its last messages above")
    if drain.undrained:
        newest = state.view.newest_checkpoint()
        start = "at the beginning" if newest is None else f"after round {newest}, which has the newest checkpoint"
        raise CommandError(TRY_LATER, f"{drain.undrained}; no task is lost, and the next start continues {start}")


def _url(config: Config, listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"{'https' if config.serve.tls_cert else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def make_state(
    config: Config,
    files: RunFiles,
    history: History,
    token: str | None,
    cleanup: ExitStack,
    drain: Drain,
    children: dict[str, SupervisedProcess],
    try_task: Callable[[Task], None] | None = None,
    scored: Scored | None = None,
) -> DaemonState:
    """Start the child processes and ingest; return the daemon's state.

    Args:
        config: of the run.
        files: of the run.
        history: open for writing.
        token: that requests must carry; None for none.
        cleanup: receives the callbacks that stop what is started here: ingest first, then the trainer, then the
            comparators.
        drain: to register with.
        children: receives the child processes by name.
        try_task: raises ``Rejected`` for a task that the model does not accept; None if tasks are not tried.
        scored: what rounds score, from ``list_scored``; by default the learners' own answers.
    """
    metrics = CollectorRegistry()
    instruments = make_instruments(metrics)
    view = open_view(files, config, scored)
    start_metrics(instruments, config.engine.kind, view)
    ranks_view = RanksView(files, lambda: children["trainer"].restarts)
    for one in (RunFiles(files.folder), files):
        reset_heartbeats(one)
    broken = Event()
    for name in (*(["comparators"] if config.regret.comparator else []), "trainer"):
        children[name] = start_child(name, config, files, broken.set if name == "trainer" else None)
    for name in ("comparators", "trainer"):
        cleanup.callback(_wait_until_drained, name, children, drain)
        drain.add(name, children)
    ingest = open_ingest(config, files, history, instruments, lambda: state.view.learned(), try_task)
    cleanup.callback(ingest.close)
    state = DaemonState(
        config=config,
        files=files,
        history=history,
        ingest=ingest,
        view=view,
        registry=metrics,
        instruments=instruments,
        adapter=Adapter(config.trainer(), files.leader),
        trainer_alive=lambda: children["trainer"].alive(),
        ranks_view=ranks_view,
        broken=broken,
        token=token,
    )
    drain.on_begin.append(partial(setattr, state, "draining", True))
    return state


def open_ingest(
    config: Config,
    files: RunFiles,
    history: History,
    instruments: Instruments,
    count_learned: Callable[[], int],
    try_task: Callable[[Task], None] | None,
) -> Ingest:
    """Return the run's ingest, which counts what it does in ``instruments``; see ``make_state`` for the rest."""
    limits = config.serve.limits
    return Ingest(
        history,
        config.task,
        limits,
        count_learned,
        lambda source, reason: instruments["tasks_rejected_total"].labels(source=source, reason=reason).inc(),
        lambda source, seconds: _count_commit(instruments, source, seconds),
        dead_letters=DeadLetters(files.dead_letters, limits.dead_letters, limits.dead_letter_bytes),
        on_gap=partial(_count_gap, instruments),
        try_task=try_task,
        outlier_sources=[source.name for source in config.source if source.outliers == "quarantine"],
    )


def make_monitors(
    files: RunFiles, children: dict[str, SupervisedProcess], upkeep: MaintenanceSupervisor, state: DaemonState
) -> dict[str, ProcessMonitor]:
    """Return the monitors of the daemon's child processes by name.

    Args:
        files: of the branch that is served.
        children: its processes.
        upkeep: starts the maintenance process when it is needed.
        state: of the daemon; its view of the ranks counts the restarts of the trainer or its ranks.
    """

    def count_restarts(name: str) -> int:
        return state.ranks_view.restarts if name == "trainer" else children[name].restarts

    found = {
        name: ProcessMonitor(files.heartbeat(name), partial(children.get, name), partial(count_restarts, name))
        for name in children
    }
    count = lambda: upkeep.child.restarts if upkeep.child else 0  # noqa: E731
    maintenance = RunFiles(files.folder).heartbeat("maintenance")  # It is one for all branches.
    return found | {"maintenance": ProcessMonitor(maintenance, lambda: upkeep.child, count)}


def _watch_lag(state: DaemonState, sources: dict[str, TaskSource | None]) -> LagMonitor:
    """Start to ask the sources' brokers how many entries wait."""
    lag, note = state.instruments["source_lag"], state.ingest.source_states.note
    return LagMonitor(
        sources,
        state.history.cursor,
        lambda name, waiting: lag.labels(source=name).set(waiting),
        on_polled=lambda name, error: note(name, "lag", error),
    )


def _monitor_branch(
    state: DaemonState,
    children: dict[str, SupervisedProcess],
    upkeep: MaintenanceSupervisor,
    make_monitor: Callable[..., HealthMonitor],
    settled: Settled,
) -> None:
    """Let the health of the daemon be that of a branch whose processes have just started."""
    state.ranks_view = RanksView(settled.files, lambda: children["trainer"].restarts)
    state.monitor = make_monitor(processes=make_monitors(settled.files, children, upkeep, state))


def _wait_until_drained(name: str, children: dict[str, SupervisedProcess], drain: Drain) -> None:
    """Wait until a child has ended, and kill it at the deadline; note if the trainer did not drain."""
    child = children.get(name)
    if child is None:
        return
    code = child.stop(min(drain.seconds_left(), COMPARATOR_SECONDS if name == "comparators" else math.inf))
    if code in (DONE, -signal.SIGTERM, -FINISH):  # a signal ends a process that is just starting
        return
    found = f"the {child.name} ended with exit code {code} and did not drain"
    log.error("%s", found)
    if child.name == "trainer":
        drain.undrained = found


def _count_commit(instruments: dict[str, object], source: str, seconds: float) -> None:
    instruments["tasks_ingested_total"].labels(source=source).inc()  # type: ignore[attr-defined]
    instruments["ingest_duration_seconds"].observe(seconds)  # type: ignore[attr-defined]


def _count_gap(instruments: dict[str, object], source: str, gap: Gap) -> None:
    instruments["source_gaps_total"].labels(source=source).inc()  # type: ignore[attr-defined]
    instruments["source_lost_entries_total"].labels(source=source).inc(gap.entries or 0)  # type: ignore[attr-defined]


def _run_server(state: DaemonState, listener: socket.socket, ready: Callable[[], None], drain: Drain) -> None:
    """Serve HTTP until a signal, then begin the drain and finish the requests in progress."""
    settings, answering = state.config.serve, AnsweringProcess(state)
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(state, answering),
            log_config=None,
            log_level="warning",
            access_log=False,
            ssl_certfile=settings.tls_cert,
            ssl_keyfile=settings.tls_key,
            timeout_graceful_shutdown=math.ceil(min(REQUEST_SECONDS, settings.drain_seconds / 2)),
            timeout_keep_alive=settings.limits.keep_alive_seconds,
            http=make_bounded_protocol(settings.limits),  # type: ignore[arg-type]
            ws="none",
        )
    )

    async def run() -> None:
        refreshing = asyncio.create_task(_refresh_periodically(state, server))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not (server.started or serving.done()):  # noqa: ASYNC110 - uvicorn has no event for this
            await asyncio.sleep(0.01)
        if server.started:
            ready()
        while not (server.should_exit or serving.done()):
            server.should_exit |= drain.requested
            await asyncio.sleep(SIGNAL_SECONDS)
        await asyncio.to_thread(drain.begin)
        await serving
        refreshing.cancel()

    with contextlib.closing(answering), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


async def _refresh_periodically(state: DaemonState, server: uvicorn.Server) -> None:
    while True:
        try:
            await asyncio.to_thread(_refresh, state)
        except Exception:  # A file that is unreadable for a while must not end the updates of the metrics.
            log.exception("the run's files cannot be read; retrying in %.0f s", RETRY_SECONDS)
            await asyncio.sleep(RETRY_SECONDS)
        server.should_exit |= state.broken.is_set()
        await asyncio.sleep(REFRESH_SECONDS)


def _refresh(state: DaemonState) -> None:
    """Read what the children have written, and compute the health of the run from it."""
    state.refresh()
    monitor = state.monitor
    assert monitor is not None
    facts = monitor.look()
    state.check(facts)
    monitor.kill_hung(facts, state.checks)
