"""The daemon: takes tasks in, keeps a trainer and a comparator running beside it, answers over HTTP, drains."""

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event

import uvicorn
from prometheus_client import CollectorRegistry

import streams.sources
from deploy.adaptation import Adapter
from deploy.api import create_app
from deploy.config import Config, ServeSettings, write_settings
from deploy.exits import CONFIG, TRY_LATER, ConfigError, Stop
from deploy.exporter import describe, make_instruments
from deploy.report import write_report
from deploy.state import DaemonState
from deploy.supervise import Supervised
from deploy.view import RunView
from online_meta import registry
from online_meta.regret import LEARNER
from streams.history import History
from streams.ingest import Ingest
from streams.ledger import HistoryBusy, HistoryFormatError, HistoryFull
from trainers.run_files import RunFiles

REFRESH_SECONDS = 0.2
DRAIN_SECONDS = 120.0
log = logging.getLogger(__name__)


def serve(config: Config, ready: Callable[[str], None]) -> None:
    """Run the daemon until SIGTERM or SIGINT, then drain: stop taking, commit, finish the round, checkpoint, report.

    ``ready`` is called with the daemon's URL once it listens. Raises ``Stop`` when it cannot start.
    """
    token = check_exposure(config.serve)
    files = RunFiles(Path(config.run.path))
    with ExitStack() as cleanup:
        listener = cleanup.enter_context(contextlib.closing(bind(config.serve)))
        history = cleanup.enter_context(open_history(files))
        write_settings(files.settings, config)
        state = make_state(config, files, history, token, cleanup)
        state.refresh()
        start_sources(state)
        scheme = "https" if config.serve.tls_cert else "http"
        host, port = listener.getsockname()[:2]
        _run_server(state, listener, lambda: ready(f"{scheme}://{host}:{port}"))
        state.draining = True
        log.info("draining")
    state.view.refresh()
    write_report(files.folder, state.view, config)


def check_exposure(settings: ServeSettings) -> str | None:
    """Return the token that requests must carry, None for none.

    Raises ``ConfigError`` when a host that others can reach lacks TLS or a token.
    """
    token = None
    if settings.token_file is not None:
        try:
            token = Path(settings.token_file).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigError(f"[serve] token_file {settings.token_file} cannot be read: {error.strerror}") from error
        if not token:
            raise ConfigError(f"[serve] token_file {settings.token_file} is empty: put a long random token in it")
    if bool(settings.tls_cert) != bool(settings.tls_key):
        raise ConfigError("[serve] tls_cert and tls_key go together: give both or neither")
    if not is_loopback(settings.host) and not (settings.tls_cert and token):
        raise ConfigError(
            f"[serve] host = {settings.host!r} can be reached by others: give tls_cert, tls_key and token_file, "
            'or listen on host = "127.0.0.1"'
        )
    return token


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind(settings: ServeSettings) -> socket.socket:
    """Return a listening socket; raises ``Stop`` (75) when the port is taken, ``ConfigError`` for a bad host."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(1024)
    except socket.gaierror as error:
        listener.close()
        raise ConfigError(f"[serve] host = {settings.host!r} is no address of this machine: {error}") from error
    except OSError as error:
        listener.close()
        raise Stop(
            TRY_LATER,
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror}. Is another daemon running there? "
            "Choose a free port by --set serve.port=PORT",
        ) from error
    return listener


@contextmanager
def open_history(files: RunFiles) -> Iterator[History]:
    """Open the run's history to write; raises ``Stop`` with the exit code that fits."""
    try:
        history = History.open(files.history, write=True)
    except HistoryBusy as error:
        raise Stop(TRY_LATER, f"{error}: this run is being served already") from error
    except HistoryFormatError as error:
        raise Stop(CONFIG, str(error)) from error
    except (HistoryFull, PermissionError) as error:
        raise Stop(TRY_LATER, str(error)) from error
    try:
        yield history
    finally:
        history.close()


def make_state(
    config: Config, files: RunFiles, history: History, token: str | None, cleanup: ExitStack
) -> DaemonState:
    """Start the children and ingest, and join all parts; ``cleanup`` stops them in the order of the data's way."""
    metrics = CollectorRegistry()
    instruments = make_instruments(metrics)
    describe(instruments, config.engine.kind, world_size=1)
    view = RunView(files, (LEARNER, *config.regret.baselines))
    children = {}
    for name in (*config.regret.comparator, "trainer"):
        child = Supervised(name, [sys.executable, "-m", f"deploy.{name}", str(files.settings)])
        cleanup.callback(child.stop, DRAIN_SECONDS)
        children[name] = child
    ingest = Ingest(
        history,
        config.task,
        config.serve.limits,
        view.learned,
        lambda source, reason: instruments["tasks_rejected_total"].labels(source=source, reason=reason).inc(),
        lambda source, seconds: _count_commit(instruments, source, seconds),
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
        trainer_restarts=lambda: children["trainer"].restarts,
        token=token,
        ingested_at_start=len(history),
    )
    return state


def _count_commit(instruments: dict[str, object], source: str, seconds: float) -> None:
    instruments["tasks_ingested_total"].labels(source=source).inc()  # type: ignore[attr-defined]
    instruments["ingest_duration_seconds"].observe(seconds)  # type: ignore[attr-defined]


def start_sources(state: DaemonState) -> None:
    """Start reading every source that is pulled; raises ``ConfigError`` for one that cannot be opened."""
    for source in state.config.source:
        module = registry.load_module(streams.sources, source.kind)
        try:
            opened = module.open(source.settings, state.config.task, source.name, state.config.run.seed)
        except ValueError as error:
            raise ConfigError(f"[[source]] {source.name}: {error}") from error
        if opened is not None:
            state.ingest.pull(source.name, opened)


def _run_server(state: DaemonState, listener: socket.socket, ready: Callable[[], None]) -> None:
    """Answer HTTP until a signal asks to stop; requests under way are finished."""
    settings = state.config.serve
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(state),
            log_level="warning",
            access_log=False,
            ssl_certfile=settings.tls_cert,
            ssl_keyfile=settings.tls_key,
            timeout_graceful_shutdown=10,
        )
    )
    # uvicorn gives a signal back to the handler from before once it has shut down; the default one would kill us.
    asked = Event()
    before = {kind: signal.signal(kind, lambda *_: asked.set()) for kind in (signal.SIGTERM, signal.SIGINT)}

    async def run() -> None:
        refreshing = asyncio.create_task(_refresh_for_ever(state))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not (server.started or serving.done()):
            await asyncio.sleep(0.01)
        if server.started:
            ready()
        await serving
        refreshing.cancel()

    asyncio.run(run())
    for kind, handler in before.items():
        signal.signal(kind, handler)


async def _refresh_for_ever(state: DaemonState) -> None:
    while True:
        await asyncio.to_thread(state.refresh)
        await asyncio.sleep(REFRESH_SECONDS)
