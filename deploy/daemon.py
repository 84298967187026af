"""The daemon: accept tasks, supervise the trainer and the comparators, serve the HTTP API, drain on a signal."""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from threading import Event

import uvicorn
import uvloop
from prometheus_client import CollectorRegistry

from deploy.checks.preflight import check_learning, check_rendezvous, open_sources
from deploy.checks.run_folder import check_same_run, check_tasks, open_history
from deploy.config.config import Config, write_settings
from deploy.exits import BROKEN, DONE, TRY_LATER, CommandError
from deploy.leader import Adapter
from deploy.logs import copy_lines
from deploy.processes.maintenance import MaintenanceSupervisor
from deploy.processes.supervisor import SupervisedProcess
from deploy.reports.report import write_report
from deploy.server.app import create_app, create_probe_app
from deploy.server.limits import allow_descriptors, make_bounded_protocol
from deploy.server.listener import ProbeServer, bind, bind_probes, check_exposure
from deploy.server.state import DaemonState
from deploy.telemetry.monitor import ArchiveMonitor, HealthMonitor
from deploy.telemetry.process_monitor import ProcessMonitor, reset_heartbeats
from deploy.telemetry.prometheus import make_instruments, start_metrics
from deploy.telemetry.ranks_view import RanksView
from deploy.telemetry.run_view import open_view
from streams.history.history import History
from streams.history.maintenance import reach_archive
from streams.ingest.dead_letters import DeadLetters
from streams.ingest.ingest import Ingest
from streams.ingest.source_reader import LagMonitor
from streams.types import Gap
from trainers.journal.run_files import RunFiles

REFRESH_SECONDS = 0.2
DRAIN_SECONDS = 120.0
RETRY_SECONDS = 5.0
log = logging.getLogger(__name__)


def serve(config: Config, ready: Callable[[str], None]) -> None:
    """Run the daemon until SIGTERM or SIGINT, then drain it.

    Draining stops intake, commits pending tasks, finishes the round, writes a checkpoint, and writes the report.

    Args:
        config: of the run.
        ready: called with the daemon's URL once it listens.

    Raises:
        CommandError: if the daemon cannot start, the report cannot be written, or the trainer cannot continue.
            Configuration errors are raised before a file is written or a process is started.
    """
    token = check_exposure(config.serve)
    check_learning(config)
    check_rendezvous(config.engine)
    allow_descriptors(config.serve.limits)
    files = RunFiles(Path(config.run.path))
    with ExitStack() as cleanup:
        listener = cleanup.enter_context(contextlib.closing(bind(config.serve)))
        probes = cleanup.enter_context(contextlib.closing(ProbeServer(bind_probes(config.serve), config.serve.limits)))
        history = cleanup.enter_context(open_history(files, config.history))
        check_tasks(history, config.task, files.history)
        check_same_run(config, files)
        sources = open_sources(config, history)
        write_settings(files.settings, config)
        state, children = make_state(config, files, history, token, cleanup)
        state.refresh()
        upkeep = cleanup.enter_context(contextlib.closing(MaintenanceSupervisor(history, config, files)))
        for name, source in sources.items():
            if source is not None:
                state.ingest.pull(name, source)
        lag, note = state.instruments["source_lag"], state.ingest.source_states.note
        watch = LagMonitor(
            sources,
            history.cursor,
            lambda name, waiting: lag.labels(source=name).set(waiting),
            on_polled=lambda name, error: note(name, "lag", error),
        )
        cleanup.callback(watch.close)
        archive = cleanup.enter_context(contextlib.closing(ArchiveMonitor(lambda: reach_archive(history))))
        processes = make_monitors(files, children, upkeep, state.ranks_view)
        monitor = HealthMonitor(state, processes, sources, archive)
        state.check(monitor.look())
        probes.start(create_probe_app(state))
        _run_server(state, monitor, listener, lambda: ready(_url(config, listener)))
        state.draining = True
        log.info("draining")
    state.view.refresh()
    state.view.close()
    try:
        write_report(files.folder, state.view, config)
    except OSError as error:
        raise CommandError(
            TRY_LATER, f"drained, but {files.folder / 'report.json'} could not be written: {error}"
        ) from error
    if state.broken.is_set():
        raise CommandError(BROKEN, "drained, because the trainer cannot continue: see its last messages above")


def _url(config: Config, listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"{'https' if config.serve.tls_cert else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def make_state(
    config: Config, files: RunFiles, history: History, token: str | None, cleanup: ExitStack
) -> tuple[DaemonState, dict[str, SupervisedProcess]]:
    """Start the child processes and ingest; return the daemon's state, and the children by name.

    Args:
        config: of the run.
        files: of the run.
        history: open for writing.
        token: that requests must carry; None for none.
        cleanup: receives the callbacks that stop what is started here: ingest first, then the trainer, then the
            comparators.
    """
    metrics = CollectorRegistry()
    instruments = make_instruments(metrics)
    view = open_view(files, config.regret)
    start_metrics(instruments, config.engine.kind, view)
    ranks_view = RanksView(files, lambda: children["trainer"].restarts)
    reset_heartbeats(files)
    children, broken = dict[str, SupervisedProcess](), Event()
    for name in (*(["comparators"] if config.regret.comparator else []), "trainer"):
        program = "ranks" if name == "trainer" and config.engine.is_distributed else name
        command = [sys.executable, "-m", f"deploy.processes.{program}", str(files.settings), config.run.logs]
        copy = copy_lines if config.run.logs == "json" else None
        child = SupervisedProcess(name, command, broken.set if name == "trainer" else None, copy)
        cleanup.callback(_drain, child)
        children[name] = child
    limits = config.serve.limits
    ingest = Ingest(
        history,
        config.task,
        limits,
        view.learned,
        lambda source, reason: instruments["tasks_rejected_total"].labels(source=source, reason=reason).inc(),
        lambda source, seconds: _count_commit(instruments, source, seconds),
        dead_letters=DeadLetters(files.dead_letters, limits.dead_letters, limits.dead_letter_bytes),
        on_gap=partial(_count_gap, instruments),
    )
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
        trainer_alive=children["trainer"].alive,
        ranks_view=ranks_view,
        broken=broken,
        token=token,
    )
    return state, children


def make_monitors(
    files: RunFiles, children: dict[str, SupervisedProcess], upkeep: MaintenanceSupervisor, ranks_view: RanksView
) -> dict[str, ProcessMonitor]:
    """Return the monitors of the daemon's child processes by name.

    Args:
        files: of the run.
        children: the processes that run from the start.
        upkeep: starts the maintenance process when it is needed.
        ranks_view: counts the restarts of the trainer or its ranks.
    """

    def count_restarts(name: str) -> int:
        return ranks_view.restarts if name == "trainer" else children[name].restarts

    found = {
        name: ProcessMonitor(files.heartbeat(name), partial(children.get, name), partial(count_restarts, name))
        for name in children
    }
    count = lambda: upkeep.child.restarts if upkeep.child else 0  # noqa: E731
    return found | {"maintenance": ProcessMonitor(files.heartbeat("maintenance"), lambda: upkeep.child, count)}


def _drain(child: SupervisedProcess) -> None:
    code = child.stop(DRAIN_SECONDS)
    if code != DONE:
        log.error(
            "the %s ended with exit code %d and did not drain; the next start continues from its last checkpoint",
            child.name,
            code,
        )


def _count_commit(instruments: dict[str, object], source: str, seconds: float) -> None:
    instruments["tasks_ingested_total"].labels(source=source).inc()  # type: ignore[attr-defined]
    instruments["ingest_duration_seconds"].observe(seconds)  # type: ignore[attr-defined]


def _count_gap(instruments: dict[str, object], source: str, gap: Gap) -> None:
    instruments["source_gaps_total"].labels(source=source).inc()  # type: ignore[attr-defined]
    instruments["source_lost_entries_total"].labels(source=source).inc(gap.entries or 0)  # type: ignore[attr-defined]


def _run_server(state: DaemonState, monitor: HealthMonitor, listener: socket.socket, ready: Callable[[], None]) -> None:
    """Serve HTTP until SIGTERM or SIGINT; finish the requests in progress."""
    settings = state.config.serve
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(state),
            log_config=None,
            log_level="warning",
            access_log=False,
            ssl_certfile=settings.tls_cert,
            ssl_keyfile=settings.tls_key,
            timeout_graceful_shutdown=10,
            timeout_keep_alive=settings.limits.keep_alive_seconds,
            http=make_bounded_protocol(settings.limits),  # type: ignore[arg-type]
            ws="none",
        )
    )
    # uvicorn re-raises the signal after its shutdown; the default handler would then kill this process.
    before = {kind: signal.signal(kind, lambda *_: None) for kind in (signal.SIGTERM, signal.SIGINT)}

    async def run() -> None:
        refreshing = asyncio.create_task(_refresh_periodically(state, monitor, server))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not (server.started or serving.done()):  # noqa: ASYNC110 - uvicorn has no event for this
            await asyncio.sleep(0.01)
        if server.started:
            ready()
        await serving
        refreshing.cancel()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())
    for kind, handler in before.items():
        signal.signal(kind, handler)


async def _refresh_periodically(state: DaemonState, monitor: HealthMonitor, server: uvicorn.Server) -> None:
    while True:
        try:
            await asyncio.to_thread(_refresh, state, monitor)
        except Exception:  # A file that is unreadable for a while must not end the updates of the metrics.
            log.exception("the run's files cannot be read; retrying in %.0f s", RETRY_SECONDS)
            await asyncio.sleep(RETRY_SECONDS)
        server.should_exit |= state.broken.is_set()
        await asyncio.sleep(REFRESH_SECONDS)


def _refresh(state: DaemonState, monitor: HealthMonitor) -> None:
    """Read what the children have written, and compute the health of the run from it."""
    state.refresh()
    facts = monitor.look()
    state.check(facts)
    monitor.kill_hung(facts, state.checks)
