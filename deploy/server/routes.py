"""The routes of the HTTP API: submit tasks, adapt, read weights, regret, status and metrics."""

from functools import partial
from typing import Annotated, Any, Literal

from anyio import to_thread
from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from deploy.config.config import Config
from deploy.exits import TRY_LATER, CommandError
from deploy.predictions import MOST_SAMPLES, AnswerFormat, Part
from deploy.processes.answers import answer_as, decode_request
from deploy.server.answering import Answered, AnsweringProcess
from deploy.server.descriptions import (
    ADAPT_BODY,
    ADAPT_ERRORS,
    ADAPT_RESPONSE,
    ERROR,
    FAILING,
    PROMOTION_ERRORS,
    QUARANTINE_ERRORS,
    TASK_BODY,
    TASK_RESPONSES,
    TENSOR_RESPONSE,
    TENSORS,
)
from deploy.server.limits import read_body
from deploy.server.origins import check_declared_type, wants_json
from deploy.server.state import DaemonState, health_of, status_of
from deploy.telemetry.health import list_failing
from deploy.telemetry.series import regret_series
from online_meta.types import Batch, Tensors
from streams.entities import find_entity
from streams.formats import wire
from streams.formats.json_body import make_example
from streams.formats.safetensors_header import is_json
from streams.history.errors import RoundDiscarded
from streams.types import Arrival, Conflict, Rejected
from trainers.journal.leader_file import encode_leader
from trainers.journal.quarantine import QUARANTINED, Quarantine

router = APIRouter()
probes = APIRouter()
"""The routes that `[serve] probes` serves, too."""

REASONS = {"trainer": "trainer_down"}
"""The reason by the name of a check that fails, where it is not that name."""


PATH = "/v1/tasks"
ADAPT_PATH = "/v1/adapt"
JSON = "application/json"


SMALL_BYTES = 128 * 1024
"""Tasks up to this size are validated in the event loop; larger ones in a thread."""

SMALL_JSON_BYTES = 8 * 1024
"""The same limit for tasks in JSON."""


@router.post(PATH, status_code=201, responses=TASK_RESPONSES, openapi_extra=TASK_BODY)
async def submit_task(request: Request, idempotency_key: Annotated[str | None, Header()] = None) -> Response:
    """Submit a task: `support_x`, `support_y`, `query_x`, `query_y` (the query is optional), as safetensors or JSON.

    In JSON, a tensor is a nested list: `{"support_x": [[0.5], [1.5]], "support_y": [[1], [2]]}`. It is meant for small
    tasks; `[serve.limits] json_bytes` bounds it.

    Named inputs and targets are `support_x.NAME` and so on. `support_weight` and `query_weight` (n,), float32 and at
    least 0, are optional.

    The response is sent once the task is durable. The header `Idempotency-Key` is the id of the task; the default is
    the SHA-256 of the body. A task that is sent again with the same id remains one round. `Content-Encoding` may be
    `zstd` or `gzip`; the id and the task are those of the decompressed body. A task on which the model raises an
    exception is refused (422, `model_error`), if `[serve] try_tasks` is set and a trial is quick.
    """
    state: DaemonState = request.app.state.daemon
    source = next((source.name for source in state.config.source if source.kind == "http"), None)
    if source is None:
        detail = 'this daemon does not accept tasks over HTTP: add [[source]] kind = "http" to its configuration'
        return JSONResponse({"reason": "no_http_source", "detail": detail}, 404)
    with request.app.state.body_budget.reserve() as reservation:
        try:
            body = await read_body(request, reservation)
            check_declared_type(request.headers, body)
        except Rejected as rejection:
            incomplete = Arrival(idempotency_key or "", bytes(reservation.received), source, None)
            await run_in_threadpool(state.ingest.reject, incomplete, rejection, complete=reservation.complete)
            raise
        id = wire.digest(body).hex() if idempotency_key is None else idempotency_key
        arrival = Arrival(id, body, source, None)
        small_bytes, limiter = SMALL_BYTES, None
        if is_json(body):  # It takes many times its size while it is read: only a few are read at a time.
            small_bytes, limiter = SMALL_JSON_BYTES, request.app.state.body_budget.unpacking
        # For a small body, handing it to a thread takes longer than validating it here.
        future = state.ingest.submit_nowait(arrival) if len(body) <= small_bytes else None
        if future is None:
            future = await to_thread.run_sync(partial(state.ingest.submit, arrival, wait=False), limiter=limiter)
        receipt = await request.app.state.future_bridge.wait_for(future)
    if isinstance(receipt, Conflict):
        detail = (
            f"the id {receipt.id!r} belongs to round {receipt.round}, which has a different body: choose another id"
        )
        return JSONResponse({"reason": "conflict", "detail": detail, "round": receipt.round}, 409)
    return JSONResponse({"id": receipt.id, "round": receipt.round}, 200 if receipt.duplicate else 201)


@router.post(ADAPT_PATH, responses={**ADAPT_RESPONSE, **ADAPT_ERRORS}, openapi_extra=ADAPT_BODY)
async def adapt(
    request: Request,
    part: Annotated[
        list[Part] | None, Query(max_length=4, description="what to add to the answer; may be repeated")
    ] = None,
    level: Annotated[
        list[Annotated[float, Field(gt=0, lt=1)]] | None,
        Query(max_length=100, description="a probability whose quantile to add to the answer; may be repeated"),
    ] = None,
    samples: Annotated[
        int | None,
        Query(ge=1, le=MOST_SAMPLES, description="how many samples of a belief to answer with, in place of the run's"),
    ] = None,
) -> Response:
    """Adapt the current meta-parameters to `support_x`, `support_y` and return `predictions` for `query_x`.

    Named inputs and targets are `support_x.NAME` and so on; `support_weight` is optional.
    Classifiers also return `labels`. A learner that answers with several outputs returns `component.K.outputs` and
    `component.K.log_weights` of their mixture, too.

    Each `part` is added under its name: `mean` is the expected target of each query row, `std` its standard deviation,
    `probabilities` are those of the classes, and `information` says in nats how much the label of a row would tell
    which of several outputs is right. With `level`, `quantiles` has the values below which the target lies with these
    probabilities, first by level, then by row, and `levels` repeats them. If the run's loss says no distribution, the
    answer is 422 with the reason `no_distribution`. If query rows have an entry beyond all that the run has seen,
    `outside` says which: an answer there is a guess.

    With `samples`, the answer is made of this number of samples of what the run believes of the task, in place of
    `[inner] samples`; `component.K.outputs` has them. The same request gives the same samples. The belief of `posterior
    = "point"` or `"particles"` has a fixed number of samples: the answer is then 422 with the reason `fixed_samples`.

    The header `X-Online-Meta-Round` is the number of rounds that the
    meta-parameters have learned. The request is not stored and changes nothing. If the model raises an exception, the
    answer is 422 with the reason `model_error`.

    The answer is JSON, with nested lists, if the header `Accept` names `application/json`; if it names no type, the
    answer has the format of the request. JSON has the `round`, too, and null for NaN and infinite values.
    """
    process: AnsweringProcess | None = request.app.state.answering
    with request.app.state.body_budget.reserve() as reservation:
        body = await read_body(request, reservation)
        check_declared_type(request.headers, body)
        as_json = wants_json(request.headers, is_json(body))
        format = AnswerFormat(as_json, tuple(dict.fromkeys(part or ())), tuple(level or ()), samples)
        ready = process is not None and process.is_ready(body)
        decoded = None if ready else await _decode(request, body)
    try:
        answered = await process.answer(body, format) if ready and process is not None else None
        if answered is None:
            answered = await _answer_here(request, decoded or await _decode(request, body), format)
    except FileNotFoundError:
        detail = "the trainer has not published its first parameters yet: try again later"
        return JSONResponse({"reason": "not_ready", "detail": detail}, 503, headers={"Retry-After": "1"})
    media_type = JSON if as_json else TENSORS
    return Response(answered.body, media_type=media_type, headers={"X-Online-Meta-Round": str(answered.round)})


async def _decode(request: Request, body: bytes) -> tuple[Batch, Tensors]:
    """Return the support set and the query inputs of a request to adapt; see ``decode_request``."""
    config: Config = request.app.state.daemon.config
    limiter = request.app.state.body_budget.unpacking if is_json(body) else None
    return await to_thread.run_sync(decode_request, config.task, config.serve.limits, body, limiter=limiter)


async def _answer_here(request: Request, decoded: tuple[Batch, Tensors], format: AnswerFormat) -> Answered:
    """Answer in this process; raises ``FileNotFoundError`` if no leader has been published."""
    state: DaemonState = request.app.state.daemon
    answer = partial(answer_as, state.adapter, *decoded, format)
    return Answered(*await to_thread.run_sync(answer, limiter=request.app.state.adapting))


@router.get("/v1/tasks/{id}", responses={404: {"description": "Unknown id", **ERROR}})
def task_status(request: Request, id: str) -> Any:
    """Return the status of a task (pending, learned, skipped or quarantined), its round and its losses.

    If the id names the `entity` that the task belongs to, the answer does, too. For a quarantined task, `reason` and
    `detail` say why. Its losses are null unless it was learned before.
    """
    state: DaemonState = request.app.state.daemon
    round = state.history.find(id)
    if round is None:
        return JSONResponse({"reason": "unknown_task", "detail": f"no task with the id {id!r} was accepted"}, 404)
    state.refresh()
    entity = find_entity(id)
    return {**describe_round(state, round), **({} if entity is None else {"entity": entity})}


def describe_round(state: DaemonState, round: int) -> dict[str, Any]:
    """Return the status of a round, its number and its losses; of a quarantined one, why it is."""
    line = state.view.round(round)
    quarantine = state.view.quarantine.by_round.get(round)
    status = "pending" if line is None else "skipped" if line["skipped"] else "learned"
    losses = {key: None if line is None else line[key] for key in ("loss_before", "loss_after")}
    if line is not None and "stored_answer" in line:
        losses["stored_answer"] = line["stored_answer"]
    if quarantine is None:
        return {"status": status, "round": round, **losses}
    return {
        "status": QUARANTINED,
        "round": round,
        **losses,
        "reason": quarantine.reason,
        "detail": quarantine.detail,
    }


@router.get("/v1/examples/{name}")
def example(
    request: Request,
    name: Annotated[Literal["tasks", "adapt"], Path(description="the path below /v1/ to which to send it")],
) -> dict[str, Any]:
    """Return a body in JSON that has the shapes of this run's tasks, with arbitrary numbers."""
    state: DaemonState = request.app.state.daemon
    return make_example(state.config.task, targets=name == "tasks")


class QuarantineRequest(BaseModel):
    """An operator's request to quarantine a round."""

    round: Annotated[int, Field(ge=0)]
    reason: Annotated[str, Field(min_length=1, max_length=500)]


@router.get("/v1/quarantine")
def list_quarantined(request: Request) -> dict[str, Any]:
    """Return the quarantined rounds, in the order in which they were quarantined.

    `was_learned` rounds were learned before, and are not revisited from round `at` on.
    """
    state: DaemonState = request.app.state.daemon
    state.refresh()
    return {"rounds": [_quarantine_to_json(state, one) for one in state.view.quarantine.by_round.values()]}


def _quarantine_to_json(state: DaemonState, quarantine: Quarantine) -> dict[str, Any]:
    entry = state.history.entry(quarantine.round)
    return {"id": entry.id, "source": entry.source, **quarantine._asdict(), "was_learned": quarantine.was_learned}


@router.post("/v1/quarantine", status_code=202, responses=QUARANTINE_ERRORS)
def quarantine_round(request: Request, wanted: QuarantineRequest) -> Any:
    """Quarantine a round: from the next update on, no learner learns or revisits it.

    No earlier figure changes. The request is durable when the response is sent.
    """
    state: DaemonState = request.app.state.daemon
    if wanted.round >= len(state.history):
        detail = f"the run has {len(state.history)} rounds, the first of which is round 0"
        return JSONResponse({"reason": "unknown_round", "detail": detail}, 404)
    state.refresh()
    if wanted.round in state.view.quarantine.by_round:
        detail = f"round {wanted.round} is in quarantine already"
        return JSONResponse({"reason": "conflict", "detail": detail}, 409)
    state.request_quarantine(wanted.round, wanted.reason)
    return {"round": wanted.round, "reason": wanted.reason}


@router.post("/v1/quarantine/{round}/retry", status_code=201, responses={**QUARANTINE_ERRORS, **TASK_RESPONSES})
async def retry_round(
    request: Request, round: Annotated[int, Path(ge=0, description="the quarantined round")]
) -> Response:
    """Submit the task of a quarantined round again, as a new task whose id ends in `.retry-ROUND`."""
    state: DaemonState = request.app.state.daemon
    if round not in state.view.quarantine.by_round:
        detail = f"round {round} is not in quarantine: GET /v1/quarantine lists the rounds that are"
        return JSONResponse({"reason": "unknown_round", "detail": detail}, 404)
    entry = state.history.entry(round)
    try:
        body = await run_in_threadpool(state.history.payload, round)
    except RoundDiscarded as error:
        return JSONResponse({"reason": "discarded", "detail": str(error)}, 410)
    suffix = f".retry-{round}"
    id = entry.id[: state.config.serve.limits.id_length - len(suffix)] + suffix
    future = await run_in_threadpool(state.ingest.submit, Arrival(id, body, entry.source, None), wait=False)
    receipt = await request.app.state.future_bridge.wait_for(future)
    return JSONResponse({"id": id, "round": receipt.round}, 200 if receipt.duplicate else 201)


@router.get("/v1/forks")
def list_forks(request: Request) -> dict[str, Any]:
    """Return the branches of the run: `forks` has the one with which it began, `main`, and each fork.

    `served` is the name of the branch that answers. Of each, `learned` is its number of rounds, and
    `against_served` compares its losses with those of the served branch over the `rounds` that both have scored since
    the first one that they play with settings of their own: the means, the mean difference, and its interval (null
    below 50 rounds). A negative difference means that the branch loses less.
    """
    state: DaemonState = request.app.state.daemon
    assert state.forks is not None
    return {"total": len(state.history), **state.forks.describe()}


@router.post("/v1/forks/{name}/promote", responses=PROMOTION_ERRORS)
def promote_fork(request: Request, name: Annotated[str, Path(description="the branch to serve")]) -> Any:
    """Serve a fork, or `main` again: every answer from now on is that of this branch.

    No request fails or waits meanwhile. The previously served branch continues in the background. The event is durable
    when the response is sent.
    """
    state: DaemonState = request.app.state.daemon
    assert state.forks is not None
    if name not in state.forks.list_names():
        detail = f"the run has no branch {name!r}: GET /v1/forks lists them"
        return JSONResponse({"reason": "unknown_fork", "detail": detail}, 404)
    try:
        round = state.forks.promote(name)
    except CommandError as error:
        if error.code == TRY_LATER:
            return JSONResponse({"reason": "not_ready", "detail": str(error)}, 503, headers={"Retry-After": "5"})
        return JSONResponse({"reason": "conflict", "detail": str(error)}, 409)
    return {"served": name, "round": round}


@router.get("/v1/weights", responses={**TENSOR_RESPONSE, 503: {"description": "None published yet", **ERROR}})
def weights(request: Request) -> Response:
    """Return what the run answers from as safetensors: of FTML, the current meta-parameters.

    Where the pool answers, these are the meta-parameters of the learner that leads.

    The header `X-Online-Meta-Round` is the number of rounds that have been learned.
    """
    state: DaemonState = request.app.state.daemon
    try:
        leader = state.adapter.leader().without_pool()
    except FileNotFoundError:
        detail = "the trainer has not published its first parameters yet: try again later"
        return JSONResponse({"reason": "not_ready", "detail": detail}, 503, headers={"Retry-After": "1"})
    # The file may have been replaced since the round was read.
    data = encode_leader(leader.state, leader.round, learner=leader.learner)
    return Response(data, media_type=TENSORS, headers={"X-Online-Meta-Round": str(leader.round)})


@router.get("/v1/regret")
def regret(
    request: Request,
    start: Annotated[int, Query(alias="from", ge=0, description="first round")] = 0,
    to: Annotated[int | None, Query(ge=0, description="one past the last round; by default all rounds")] = None,
    points: Annotated[int, Query(ge=1, le=10_000, description="maximum number of buckets")] = 1000,
) -> dict[str, Any]:
    """Return the regret ledger over a range of rounds: losses of every learner, comparators and regret.

    If `[regret] prefixes` are configured, `efficiency` contains them and the `proficiency`. The `efficiency` of each
    learner then has one value per bucket: the mean loss after each prefix, the share of rounds that `reached` the
    proficiency, and the `mean_points_needed` in those rounds (null if no round reached it).

    With a pool, `pool` has its mean `weights` by expert in each bucket, and at the end of the bucket its `regret`
    against the best expert, the `bound` of that, and the `unclipped_regret` (null if the last round of the bucket was
    skipped).
    """
    state: DaemonState = request.app.state.daemon
    state.refresh()
    return regret_series(state.view, start, to, points)


@router.get("/v1/verdict")
def verdict(request: Request) -> dict[str, Any]:
    """Return whether meta-learning pays on this stream: a `sentence`, and what it says.

    `state` is "pays", "does_not" or "too_early". `gain` is the mean loss of `best_without`, the best answer that does
    not learn across tasks, minus that of `reference`, the pool or, without one, the leader, over `rounds`. Its 95 %
    `interval` may be looked at after every round, and holds although `best_without` was chosen afterwards. `weights`
    are the experts' mean shares of the pool's weight over the last 100 rounds, and `seconds_per_round` what each
    learner costs. `can_be_switched_off` lists the learners that the pool is ahead of and hardly gives weight to;
    `advice` says so in a sentence.
    """
    state: DaemonState = request.app.state.daemon
    state.refresh()
    return state.view.verdict()


@router.get("/v1/status")
def status(request: Request) -> dict[str, Any]:
    """Return the state of the run, as the dashboard and `online-meta status` show it."""
    return status_of(request.app.state.daemon)


@router.get("/v1/health")
def health(request: Request) -> dict[str, Any]:
    """Return the health of the run: the worst level of all checks, and the checks.

    A check has a `name`, a `level` ("ok", "warn" or "fail"), the `evidence`, advice on `what_to_do`, the areas that do
    not work if it fails (`of`), the Unix time `since` which it has had its level, and, if it stays ok although its
    evidence is bad, the check that explains this (`because`).
    """
    return health_of(request.app.state.daemon)


@probes.get("/healthz")
def alive() -> dict[str, str]:
    """Return 200 while the daemon is alive."""
    return {"status": "alive"}


@probes.get("/readyz", responses={503: {"description": "Not ready: the checks that fail, and why", **FAILING}})
def ready(
    request: Request,
    of: Annotated[
        Literal["ingest", "answers", "learning"] | None,
        Query(description="what must work: taking tasks in, answering or learning; by default all of it"),
    ] = None,
) -> Any:
    """Return 200 while no check of the run's health fails, otherwise 503 and the checks that fail.

    A run that is idle, or starts, compiles or replays with progress, is ready. A run in which tasks wait without
    progress is not.
    """
    state: DaemonState = request.app.state.daemon
    failing = list_failing(state.health(), of)
    if not failing:
        return {"status": "ready"}
    names = [check.name for check in failing]
    reason = "draining" if state.draining else REASONS.get(names[0], names[0].partition(":")[0])
    detail = "; ".join(f"{check.name}: {check.evidence}" for check in failing)
    return JSONResponse({"reason": reason, "detail": detail, "failing": names}, 503)


@probes.get("/metrics", include_in_schema=False)
def metrics(request: Request) -> Response:
    """Return the metrics in the Prometheus text format."""
    state: DaemonState = request.app.state.daemon
    state.update_gauges()
    return Response(generate_latest(state.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


router.include_router(probes)
