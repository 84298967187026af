"""The HTTP application of the daemon: authentication, security headers, error responses, routes."""

import asyncio
import hmac
import json
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from copy import deepcopy
from importlib.resources import files as package_files
from typing import Any

from anyio import CapacityLimiter
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import online_meta
from deploy.server import entities, routes
from deploy.server.answering import AnsweringProcess
from deploy.server.entity_rows import StatisticsUnknown
from deploy.server.limits import BodyBudget, BudgetExhausted, TooSlow
from deploy.server.origins import JSON_TYPES, TASK_TYPES, AllowedHosts, refuse_media_type
from deploy.server.state import DaemonState
from streams.formats.compression import DECOMPRESSORS
from streams.formats.json_body import find_short_example
from streams.history.errors import HistoryDamaged, HistoryFull
from streams.history.predictions import PredictionsFull
from streams.types import BacklogFull, IngestClosed, Rejected


class FutureBridge:
    """A bridge that lets an event loop await futures of other threads.

    Futures that complete at the same time wake the loop once. ``asyncio.wrap_future`` would wake it once per future,
    which takes as long as all other work on a small task.
    """

    def __init__(self) -> None:
        """Start without pending futures."""
        self._lock = threading.Lock()
        self._done: list[tuple[asyncio.Future[Any], Future[Any]]] = []

    async def wait_for(self, future: "Future[Any]") -> Any:
        """Return the result of the future, or raise its exception.

        Call it from one event loop only. Cancelling the wait does not cancel the future.
        """
        loop = asyncio.get_running_loop()
        waiting = loop.create_future()

        def on_done(done: "Future[Any]") -> None:
            with self._lock:
                self._done.append((waiting, done))
                first = len(self._done) == 1  # Later ones are delivered by the wake-up that is already scheduled.
            if first and not loop.is_closed():
                loop.call_soon_threadsafe(self._deliver)

        future.add_done_callback(on_done)
        return await waiting

    def _deliver(self) -> None:
        with self._lock:
            found, self._done = self._done, []
        for waiting, done in found:
            if waiting.done():  # The wait was cancelled.
                continue
            error = done.exception()
            if error is None:
                waiting.set_result(done.result())
            else:
                waiting.set_exception(error)


MAX_CONCURRENT_ADAPTATIONS = 2


REJECTION_STATUS = {"too_large": 413, "expands_too_much": 413, "unknown_encoding": 415}
"""HTTP status by the reason of a rejection; 422 for all other reasons."""


OPEN_PATHS = ("/", "/healthz", "/favicon.ico")


OPEN_PREFIXES = ("/static/", "/static-offline-docs/", "/docs", "/openapi.json")


FAST_PATHS = (routes.PATH, routes.ADAPT_PATH)
"""The paths to which programs send many small bodies."""


PAGE_POLICY = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'"


DOCS_POLICY = "default-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"


def create_app(state: DaemonState, answering: AnsweringProcess | None = None) -> FastAPI:
    """Return the daemon's HTTP application, which reads and changes ``state``.

    Args:
        state: of the daemon.
        answering: the process that answers requests to adapt; by default, threads of this one do.
    """
    app: FastAPI = FastAPIOffline(
        redoc_url=None,
        title="online-meta",
        version=online_meta.__version__,
        description="Stream few-shot tasks in, adapt with the current meta-parameters, read the regret.",
    )
    app.state.daemon, app.state.answering = state, answering
    app.state.future_bridge = FutureBridge()
    app.state.body_budget = BodyBudget(state.config.serve.limits)
    # Adaptation is CPU work: concurrent requests must not occupy the threads that make tasks durable.
    app.state.adapting = CapacityLimiter(MAX_CONCURRENT_ADAPTATIONS)
    app.include_router(routes.router)
    app.include_router(entities.router)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") != app.openapi_url]
    app.add_api_route("/openapi.json", _describe_api, include_in_schema=False)
    dashboard = str(package_files("deploy") / "dashboard")
    app.mount("/static", StaticFiles(directory=dashboard), name="static")
    app.add_api_route("/", lambda: FileResponse(f"{dashboard}/index.html"), include_in_schema=False)
    app.add_middleware(_FastPath)
    app.add_middleware(_SecurityMiddleware, token=state.token, allowed_hosts=AllowedHosts(state.config.serve))
    for kind, answer in _ERROR_HANDLERS.items():
        app.add_exception_handler(kind, answer)
    return app


def _describe_api(request: Request) -> JSONResponse:
    """Return the description of the API, with examples that have the shapes of this run's tasks."""
    app: FastAPI = request.app
    state: DaemonState = app.state.daemon
    described = deepcopy(app.openapi())
    for path in (routes.PATH, routes.ADAPT_PATH):
        operation, name = described["paths"][path]["post"], path.removeprefix("/v1/")
        body = find_short_example(state.config.task, targets=path == routes.PATH)
        line = make_curl_line(str(request.base_url).rstrip("/"), name, body, state.token is not None)
        token = " `$TOKEN` is the daemon's token." if state.token is not None else ""
        operation["description"] += f"\n\nAn example with this run's shapes:{token}\n\n```sh\n{line}\n```"
        if body is not None:
            operation["requestBody"]["content"]["application/json"]["example"] = body
    return JSONResponse(described)


def make_curl_line(address: str, name: str, body: Mapping[str, Any] | None, token: bool) -> str:
    """Return the command that sends an example.

    Args:
        address: of the daemon, without a slash at the end.
        name: "tasks" or "adapt".
        body: the example; None reads it from /v1/examples.
        token: whether the daemon requires one; the command then takes it from the variable TOKEN.
    """
    bearer = ' -H "Authorization: Bearer $TOKEN"' if token else ""
    command = f"curl {address}/v1/{name}{bearer} -H 'Content-Type: application/json'"
    if body is not None:
        return f"{command} -d '{json.dumps(body)}'"
    return f"curl -s {address}/v1/examples/{name}{bearer} | {command} --data-binary @-"


def create_probe_app(state: DaemonState) -> FastAPI:
    """Return the application of ``[serve] probes``: /healthz, /readyz and /metrics, without a token."""
    app = FastAPI(openapi_url=None)
    app.state.daemon = state
    app.include_router(routes.probes)
    app.add_middleware(_SecurityMiddleware, token=None, allowed_hosts=AllowedHosts(state.config.serve))
    for kind, answer in _ERROR_HANDLERS.items():
        app.add_exception_handler(kind, answer)
    return app


class _SecurityMiddleware:
    """Middleware that refuses foreign hosts and pages, requires the token, and sets security headers for browsers.

    It is plain ASGI, because Starlette's function middleware takes longer than the ingest of a task.
    """

    def __init__(self, app: ASGIApp, token: str | None, allowed_hosts: AllowedHosts) -> None:
        self._app, self._token, self._allowed_hosts = app, token, allowed_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path = scope["path"]

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                policy = DOCS_POLICY if path.startswith("/docs") else PAGE_POLICY
                message["headers"] += [
                    (b"content-security-policy", policy.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"cross-origin-resource-policy", b"same-origin"),
                ]
            await send(message)

        refusal = self._allowed_hosts.refuse(scope)
        if refusal is not None:
            return await _error_response(*refusal)(scope, receive, send_with_policy)
        open_path = path in OPEN_PATHS or path.startswith(OPEN_PREFIXES)
        if not (self._token is None or open_path or _has_token(self._token, Headers(scope=scope))):
            detail = "send the daemon's token as `Authorization: Bearer TOKEN`"
            response = _error_response(401, "unauthorized", detail, **{"WWW-Authenticate": "Bearer"})
            return await response(scope, receive, send_with_policy)
        if scope["method"] == "POST":
            accepted = TASK_TYPES if path in FAST_PATHS else JSON_TYPES
            refusal = refuse_media_type(scope, accepted)
            if refusal is not None:
                response = _error_response(*refusal, Accept=", ".join(accepted))
                return await response(scope, receive, send_with_policy)
        return await self._app(scope, receive, send_with_policy)


class _FastPath:
    """Middleware that handles tasks and requests to adapt before routing, which takes longer than a small task.

    The routes in ``routes`` exist for the API documentation. Errors get the same responses as on other routes.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        fast = scope["type"] == "http" and scope["path"] in FAST_PATHS and scope["method"] == "POST"
        if not fast or scope["query_string"]:  # Routing reads and checks the parameters.
            return await self._app(scope, receive, send)
        request = Request(scope, receive)
        try:
            if scope["path"] == routes.ADAPT_PATH:
                response = await routes.adapt(request)
            else:
                response = await routes.submit_task(request, request.headers.get("idempotency-key"))
        except tuple(_ERROR_HANDLERS) as error:
            answer = next(answer for kind, answer in _ERROR_HANDLERS.items() if isinstance(error, kind))
            response = await answer(request, error)
        return await response(scope, receive, send)


def _has_token(token: str, headers: Headers) -> bool:
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(credentials.strip().encode(), token.encode())


async def _bad_parameter(_request: Request, error: Any) -> Response:
    detail = "; ".join(f"{item['loc'][-1]}: {item['msg']}" for item in error.errors())
    return _error_response(422, "bad_parameter", detail)


async def _no_route(request: Request, error: Any) -> Response:
    reason = {404: "not_found", 405: "wrong_method"}.get(error.status_code, "refused")
    answer = _error_response(
        error.status_code, reason, f"{request.method} {request.url.path}: {error.detail}; see /docs"
    )
    answer.headers.update(error.headers or {})
    return answer


def _error_response(status: int, reason: str, detail: str, **headers: str) -> JSONResponse:
    return JSONResponse({"reason": reason, "detail": detail}, status, headers=headers)


async def _rejected(_request: Request, error: Any) -> Response:
    status = REJECTION_STATUS.get(error.reason, 422)
    headers = {415: {"Accept-Encoding": ", ".join(DECOMPRESSORS)}}.get(status, {})
    if status == 413:
        # Without this the server would read the rest of the body, whatever its size.
        headers = {"Connection": "close"}
    return _error_response(status, error.reason, error.detail, **headers)


async def _too_slow(_request: Request, error: Any) -> Response:
    return _error_response(408, "too_slow", str(error), Connection="close")


async def _budget_exhausted(_request: Request, error: Any) -> Response:
    return _error_response(429, "crowded", str(error), Connection="close", **{"Retry-After": "1"})


async def _client_disconnected(_request: Request, _error: Any) -> Response:
    return _error_response(400, "hung_up", "the connection ended before the body did")  # for the log only


async def _backlog_full(_request: Request, error: Any) -> Response:
    seconds = str(max(1, round(error.retry_after)))
    return _error_response(429, "backlog_full", str(error), **{"Retry-After": seconds})


async def _disk_full(_request: Request, error: Any) -> Response:
    return _error_response(507, "disk_full", f"the task was not stored: {error}", **{"Retry-After": "10"})


async def _predictions_full(_request: Request, error: Any) -> Response:
    return _error_response(507, "predictions_full", str(error))


async def _not_ready(_request: Request, error: Any) -> Response:
    return _error_response(503, "not_ready", str(error), **{"Retry-After": "1"})


async def _closing(_request: Request, error: Any) -> Response:
    return _error_response(503, "draining", str(error), **{"Retry-After": "5"})


async def _damaged(_request: Request, error: Any) -> Response:
    return _error_response(500, "history_damaged", str(error))


_ERROR_HANDLERS: dict[type[Exception], Any] = {
    RequestValidationError: _bad_parameter,
    HTTPException: _no_route,
    ClientDisconnect: _client_disconnected,
    Rejected: _rejected,
    TooSlow: _too_slow,
    BudgetExhausted: _budget_exhausted,
    BacklogFull: _backlog_full,
    HistoryFull: _disk_full,
    PredictionsFull: _predictions_full,
    StatisticsUnknown: _not_ready,
    IngestClosed: _closing,
    HistoryDamaged: _damaged,
}
