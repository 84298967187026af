"""Routes that take tensors in: tasks to learn, support sets to adapt to."""

from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Header, Request, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from deploy.adaptation import encode_predictions
from deploy.bodies import read_body
from deploy.state import DaemonState
from streams import wire
from streams.arrivals import Arrival, Conflict, Rejected

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
