"""Routes that take tensors in: tasks to learn, support sets to adapt to."""

from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool

from deploy.leader import encode_predictions
from deploy.server.limits import read_body
from deploy.server.state import DaemonState, status_of
from deploy.telemetry.series import regret_series
from streams.formats import wire
from streams.types import Arrival, Conflict, Rejected
from trainers.journal.leader_file import encode_leader

router = APIRouter()


PATH = "/v1/tasks"


SMALL_BYTES = 128 * 1024


TENSORS = "application/vnd.safetensors"


TENSOR_BODY: dict[str, Any] = {
    "requestBody": {"required": True, "content": {TENSORS: {"schema": {"type": "string", "format": "binary"}}}}
}


TENSOR_RESPONSE: dict[int | str, dict[str, Any]] = {
    200: {"content": {TENSORS: {"schema": {"type": "string", "format": "binary"}}}}
}


ERROR: dict[str, Any] = {
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {"reason": {"type": "string"}, "detail": {"type": "string"}},
                "required": ["reason", "detail"],
            }
        }
    }
}


RECEIPT: dict[str, Any] = {
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {"id": {"type": "string"}, "round": {"type": "integer"}},
                "required": ["id", "round"],
            }
        }
    }
}


TASK_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "A duplicate of a durable task: the round it has", **RECEIPT},
    201: {"description": "Durable", **RECEIPT},
    404: {"description": "This daemon takes no tasks over HTTP", **ERROR},
    409: {"description": "The id belongs to a task of other bytes", **ERROR},
    408: {"description": "The body did not come in time", **ERROR},
    413: {"description": "The body is over the limit, as it came or unpacked", **ERROR},
    415: {"description": "The body's Content-Encoding is none that is taken; see Accept-Encoding", **ERROR},
    422: {"description": "Not a task of this run; `reason` is a fixed slug, `detail` a sentence", **ERROR},
    429: {"description": "Too many rounds or bodies wait; see Retry-After", **ERROR},
    503: {"description": "The daemon is draining", **ERROR},
    507: {"description": "The disk is full; the task was not kept", **ERROR},
}


ADAPT_ERRORS: dict[int | str, dict[str, Any]] = {
    **{status: TASK_RESPONSES[status] for status in (408, 413, 415, 422)},
    429: {"description": "Too many bodies wait; see Retry-After", **ERROR},
    503: {"description": "There are no parameters yet", **ERROR},
}


@router.post(PATH, status_code=201, responses=TASK_RESPONSES, openapi_extra=TENSOR_BODY)
async def submit_task(request: Request, idempotency_key: Annotated[str | None, Header()] = None) -> Response:
    """Take a task: safetensors `support_x`, `support_y`, `query_x`, `query_y` (a query may be left out).

    `Content-Encoding` may be `zstd` or `gzip`; what counts is the body unpacked, also for its SHA-256. Answers only
    when the task is durable. `Idempotency-Key` is the task's id (else the body's SHA-256): the same task may be sent
    again, and stays one round.
    """
    state: DaemonState = request.app.state.daemon
    source = next((source.name for source in state.config.source if source.kind == "http"), None)
    if source is None:
        detail = 'this daemon takes no tasks over HTTP: add [[source]] kind = "http" to its configuration'
        return JSONResponse({"reason": "no_http_source", "detail": detail}, 404)
    with request.app.state.body_budget.reserve() as reservation:
        try:
            body = await read_body(request, reservation)
        except Rejected as rejection:
            incomplete = Arrival(idempotency_key or "", bytes(reservation.received), source, None)
            await run_in_threadpool(state.ingest.reject, incomplete, rejection, complete=reservation.complete)
            raise
        id = wire.digest(body).hex() if idempotency_key is None else idempotency_key
        arrival = Arrival(id, body, source, None)
        # A thread takes longer to be asked than such a body to be looked at.
        future = state.ingest.submit_nowait(arrival) if len(body) <= SMALL_BYTES else None
        if future is None:
            future = await run_in_threadpool(state.ingest.submit, arrival, wait=False)
        receipt = await request.app.state.future_bridge.wait_for(future)
    if isinstance(receipt, Conflict):
        detail = (
            f"the id {receipt.id!r} belongs to round {receipt.round}, which was made of other bytes: choose another"
        )
        return JSONResponse({"reason": "conflict", "detail": detail, "round": receipt.round}, 409)
    return JSONResponse({"id": receipt.id, "round": receipt.round}, 200 if receipt.duplicate else 201)


@router.post("/v1/adapt", responses={**TENSOR_RESPONSE, **ADAPT_ERRORS}, openapi_extra=TENSOR_BODY)
async def adapt(request: Request) -> Response:
    """Adapt the current leader to `support_x`, `support_y`; return `predictions` (and `labels`) for `query_x`.

    The header `X-Online-Meta-Round` tells how many rounds the leader had learned. Nothing is kept.
    """
    state: DaemonState = request.app.state.daemon
    limits = state.config.serve.limits
    with request.app.state.body_budget.reserve() as reservation:
        body = await read_body(request, reservation)
        support, query_x = await run_in_threadpool(wire.decode_support, body, state.config.task, limits)
    try:
        output, round = await to_thread.run_sync(
            state.adapter.predict, support, query_x, limiter=request.app.state.adapting
        )
    except FileNotFoundError:
        detail = "the trainer has not published its first parameters yet: ask again in a moment"
        return JSONResponse({"reason": "not_ready", "detail": detail}, 503, headers={"Retry-After": "1"})
    encoded = encode_predictions(output, state.config.task.y == "class")
    return Response(encoded, media_type=TENSORS, headers={"X-Online-Meta-Round": str(round)})


@router.get("/v1/tasks/{id}", responses={404: {"description": "Unknown id", **ERROR}})
def task_status(request: Request, id: str) -> Any:
    """Tell what became of a task: pending, learned or skipped, its round and its losses."""
    state: DaemonState = request.app.state.daemon
    round = state.history.find(id)
    if round is None:
        return JSONResponse({"reason": "unknown_task", "detail": f"no task with the id {id!r} was accepted"}, 404)
    state.refresh()
    line = state.view.round(round)
    status = "pending" if line is None else "skipped" if line["skipped"] else "learned"
    losses = {key: None if line is None else line[key] for key in ("loss_before", "loss_after")}
    return {"status": status, "round": round, **losses}


@router.get("/v1/weights", responses={**TENSOR_RESPONSE, 503: {"description": "None published yet", **ERROR}})
def weights(request: Request) -> Response:
    """Return the current meta-parameters as safetensors; `X-Online-Meta-Round` tells how many rounds they learned."""
    state: DaemonState = request.app.state.daemon
    try:
        leader = state.adapter.leader()
    except FileNotFoundError:
        detail = "the trainer has not published its first parameters yet: ask again in a moment"
        return JSONResponse({"reason": "not_ready", "detail": detail}, 503, headers={"Retry-After": "1"})
    data = encode_leader(leader.meta, leader.round)  # not the file: it may have been replaced since the round was read
    return Response(data, media_type=TENSORS, headers={"X-Online-Meta-Round": str(leader.round)})


@router.get("/v1/regret")
def regret(
    request: Request,
    start: Annotated[int, Query(alias="from", ge=0, description="first round")] = 0,
    to: Annotated[int | None, Query(ge=0, description="one past the last round; all by default")] = None,
    points: Annotated[int, Query(ge=1, le=10_000, description="at most so many buckets")] = 1000,
) -> dict[str, Any]:
    """Return the regret ledger: losses of every learner, comparators and regret, over a range of rounds.

    Where `[regret] prefixes` are configured, `efficiency` tells them and the `proficiency`, and that of each learner, a
    value a bucket: the mean loss after each prefix, the share of rounds that `reached` the proficiency, and the
    `mean_points_needed` in those (null where none reached it).
    """
    state: DaemonState = request.app.state.daemon
    state.refresh()
    return regret_series(state.view, start, to, points)


@router.get("/v1/status")
def status(request: Request) -> dict[str, Any]:
    """Return what a person asks first, as the dashboard and `online-meta status` show it."""
    return status_of(request.app.state.daemon)


@router.get("/healthz")
def health() -> dict[str, str]:
    """Answer while the daemon is alive."""
    return {"status": "alive"}


@router.get("/readyz", responses={503: {"description": "Not ready, and why", **ERROR}})
def ready(request: Request) -> Any:
    """Answer 200 while tasks are taken and the trainer runs, 503 and the reason otherwise."""
    state: DaemonState = request.app.state.daemon
    phase = state.phase()
    if phase in ("draining", "trainer_down"):
        details = {"draining": "the daemon is draining", "trainer_down": "the trainer is down and will be restarted"}
        return JSONResponse({"reason": phase, "detail": details[phase]}, 503)
    return {"status": "ready"}


@router.get("/metrics", include_in_schema=False)
def metrics(request: Request) -> Response:
    """Return the metrics in Prometheus' text format."""
    state: DaemonState = request.app.state.daemon
    state.update_gauges()
    return Response(generate_latest(state.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})
