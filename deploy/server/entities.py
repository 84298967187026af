"""The routes of the HTTP API on entities, such as stores or patients: what is known of one, predictions, new rows."""

import json
import math
import time
from hashlib import sha256
from secrets import token_hex
from typing import Annotated, Any

import torch
from anyio import to_thread
from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.responses import JSONResponse
from safetensors.torch import load

from deploy.leader import model_error_context
from deploy.predictions import name_outcomes, name_prediction, restore_prediction
from deploy.server.descriptions import ERROR, OBSERVE_BODY, OBSERVE_RESPONSES, PREDICT_BODY, PREDICT_RESPONSES
from deploy.server.entity_rows import (
    DecodedRows,
    decode_rows,
    encode_labels,
    find_rows,
    find_settings,
    prediction_to_json,
    read_object,
    save_tensors,
)
from deploy.server.routes import describe_round
from deploy.server.state import DaemonState
from online_meta.batches import count_samples, name_tensors, select_samples
from online_meta.prediction import loss_of
from online_meta.types import Batch, Prediction, Task
from streams.entities import make_entity_id
from streams.formats import wire
from streams.history.entity_rounds import find_rounds, read_rows
from streams.history.errors import RoundDiscarded
from streams.history.observations import assign_task, drop_bodies, join_rows, keep_rows, list_waiting
from streams.history.predictions import (
    Kept,
    Room,
    count_unlabelled,
    drop_prediction_body,
    find_prediction,
    keep_prediction,
    note_labels,
)
from streams.tables.schema import select_targets, write_state
from streams.types import Arrival, BacklogFull, Conflict, Receipt, Rejected

router = APIRouter()

Key = Annotated[str, Path(description="the key of the entity, percent-encoded", min_length=1, max_length=1000)]


@router.get("/v1/entities/{key:path}", responses={404: {"description": "The run has nothing of this entity", **ERROR}})
def show_entity(
    request: Request,
    key: Key,
    points: Annotated[int, Query(ge=0, le=10_000, description="the largest number of rounds listed")] = 1000,
) -> Any:
    """Return what the run knows of an entity: the number of its `rows`, and its rounds with their losses.

    `rounds` lists the newest ones, oldest first, of `total` rounds from `first_round` to `last_round`. A row that
    several tasks have, because the support of the later ones is the entity's own past, counts once. `waiting` rows were
    observed and are in no task yet; they count, too. `rows` is null if retention has removed one of the rounds. `kept`
    predictions wait for their labels.
    """
    state: DaemonState = request.app.state.daemon
    found, waiting = find_rounds(state.history, key), list_waiting(state.history, key)
    kept = count_unlabelled(state.history, key)
    if not found and not waiting and not kept:
        detail = f"the run has nothing of an entity {key!r}: the id of its tasks would be SOURCE..KEY..AT"
        return JSONResponse({"reason": "unknown_entity", "detail": detail}, 404)
    state.refresh()
    try:
        rows = _read_known(state, key)
        count = 0 if rows is None else count_samples(rows)
    except RoundDiscarded:
        count = None
    return {
        "entity": key,
        "rows": count,
        "waiting": sum(one.rows for one in waiting),
        "kept": kept,
        "total": len(found),
        "first_round": found[0] if found else None,
        "last_round": found[-1] if found else None,
        "rounds": [_show_round(state, round) for round in found[max(len(found) - points, 0) :]],
    }


def _show_round(state: DaemonState, round: int) -> dict[str, Any]:
    entry = state.history.entry(round)
    return {"id": entry.id, "source": entry.source, "arrived": entry.arrived, **describe_round(state, round)}


def _read_known(state: DaemonState, key: str, most: int | None = None) -> Batch | None:
    """Return the rows of an entity that are in tasks, then those that wait; at most the newest ``most`` ones."""
    of_tasks = read_rows(state.history, find_rounds(state.history, key))
    waiting = [one.read() for one in list_waiting(state.history, key) if not _is_durable(state, one.task)]
    rows = join_rows([*([] if of_tasks is None else [of_tasks]), *waiting])
    return rows if rows is None or most is None else select_samples(rows, slice(-most, None))


def _is_durable(state: DaemonState, task: str | None) -> bool:
    return task is not None and state.history.find(task) is not None


@router.post("/v1/entities/{key:path}/predict", responses=PREDICT_RESPONSES, openapi_extra=PREDICT_BODY)
async def predict(request: Request, key: Key) -> Response:
    """Predict the targets of `rows` of an entity, after adapting to what is known of it: `{"rows": [{"x": [0.5]}]}`.

    Where a source of the run has columns, a row may have their names instead: `{"price": 3.5, "colour": "red"}`. The
    answer is then in the units of the target's column, and labels and `classes` are its categories.

    The support set are the newest known rows, at most `past_rows` of `[[source]] kind = "http"`; `rows` says how many.
    The answer has the `mean` of each target, or of classes the `probabilities` and the `labels`. Where the outcome has
    a distribution function, `interval` has the bounds `low` and `high` between which a target lies with a probability
    of `level`. `outside` is true of rows beyond all that the run has seen, if there are any.

    Nothing is stored, unless the body has `"keep": true`: the prediction is then kept until its labels are
    sent to `observe` with the id `prediction`.
    """
    state: DaemonState = request.app.state.daemon
    body = await read_object(request)
    rows, keep = find_rows(body), body.get("keep", False)
    if not isinstance(keep, bool):
        raise Rejected("unreadable", '"keep" must be true or false')
    source = _find_source(state)
    if keep and source is None:
        return _no_source()

    def answer() -> dict[str, Any]:
        known = _read_known(state, key, find_settings(state).past_rows)
        decoded = decode_rows(state, rows, targets=False)
        if keep and known is None and len(rows) < 2:
            detail = "no row of the entity is known: observe some, or keep a prediction of two rows or more, so that "
            raise Rejected("empty_support", detail + "part of them can be the support set of their task")
        example = select_samples(decoded.batch, slice(0, 0)) if known is None else known
        prediction, round, outside = state.adapter.predict(example, decoded.x)
        count = 0 if known is None else count_samples(known)
        found = {"entity": key, "rows": count, "round": round, **prediction_to_json(prediction, decoded.table)}
        if bool(outside.any()):
            found["outside"] = outside.tolist()
        if keep:
            assert source is not None
            found["prediction"] = _keep(state, source, key, (known, decoded, prediction, round))
        return found

    try:
        return JSONResponse(await to_thread.run_sync(answer, limiter=request.app.state.adapting))
    except FileNotFoundError:
        detail = "the trainer has not published its first parameters yet: try again later"
        return JSONResponse({"reason": "not_ready", "detail": detail}, 503, headers={"Retry-After": "1"})


@router.post(
    "/v1/entities/{key:path}/observe", status_code=201, responses=OBSERVE_RESPONSES, openapi_extra=OBSERVE_BODY
)
async def observe(request: Request, key: Key, idempotency_key: Annotated[str | None, Header()] = None) -> Response:
    """Take new rows of an entity: `{"rows": [{"x": [0.5], "y": [1]}]}`. They are durable when the response is sent.

    Where a source of the run has columns, a row may have their names instead: `{"price": 3.5, "sold": 12}`.

    Once `min_rows` of `[[source]] kind = "http"` wait, they become a task: the rows known before are its support set
    and the new ones its query set. The first task of an entity holds out. `task` has its id and round, or is null. Rows
    that are sent again with the same header `Idempotency-Key` count once; the default is the SHA-256 of the rows.

    The labels of a kept prediction, `{"prediction": "...", "labels": [1.5]}`, one for each of its rows, make a round at
    once: its support set is what the prediction saw. `loss` is that of the stored answer, which the record of the round
    has as `stored_answer`. The same labels again count once.
    """
    state: DaemonState = request.app.state.daemon
    source = _find_source(state)
    if source is None:
        return _no_source()
    wire.check_id(make_entity_id(source, key, "0" * 20), state.config.serve.limits)
    body = await read_object(request)
    if "prediction" in body:
        return await to_thread.run_sync(_take_labels, state, key, body)
    rows = find_rows(body)
    name = idempotency_key or sha256(json.dumps(rows).encode()).hexdigest()

    def take() -> dict[str, Any]:
        batch = decode_rows(state, rows, targets=True).batch
        with state.observing:
            new = keep_rows(state.history, key, name, batch, len(rows))
            receipt = _make_task(state, source, key)
            waiting = sum(one.rows for one in list_waiting(state.history, key))
        task = None if receipt is None else {"id": receipt.id, "round": receipt.round}
        return {"entity": key, "new": len(rows) if new else 0, "waiting": waiting, "task": task}

    answer = await to_thread.run_sync(take)
    return JSONResponse(answer, 201 if answer["new"] else 200)


def _no_source() -> JSONResponse:
    detail = 'this daemon does not accept rows over HTTP: add [[source]] kind = "http" to its configuration'
    return JSONResponse({"reason": "no_http_source", "detail": detail}, 404)


def _find_source(state: DaemonState) -> str | None:
    """Return the name of the source that takes rows over HTTP; None if there is none."""
    return next((source.name for source in state.config.source if source.kind == "http"), None)


def _make_task(state: DaemonState, source: str, key: str) -> Receipt | None:
    """Submit the waiting rows of an entity as a task, if they are enough; return None if they wait on.

    Raises:
        Rejected: if the task is refused, for example because the model fails on it; its rows are then a dead letter.
    """
    settings, waiting = find_settings(state), list_waiting(state.history, key)
    begun = [one for one in waiting if one.task is not None]
    if not begun:
        if sum(one.rows for one in waiting) < settings.min_rows:
            return None
        begun, id = waiting, make_entity_id(source, key, f"o{waiting[0].number}-{waiting[-1].number}")
        assign_task(state.history, begun, id)
    else:
        id = str(begun[0].task)
    if (round := state.history.find(id)) is None:
        new = join_rows([one.read() for one in begun])
        past = read_rows(state.history, find_rounds(state.history, key))
        assert new is not None
        support = None if past is None else select_samples(past, slice(-settings.past_rows, None))
        task = wire.hold_out(new, state.config.task) if support is None else Task(support, new)
        try:
            answer = state.ingest.submit(Arrival(id, wire.encode(task), source, None), wait=False).result()
        except BacklogFull:
            return None  # The rows are durable; the next request tries again.
        except Rejected:
            drop_bodies(state.history, id)
            raise
        round = answer.round
    drop_bodies(state.history, id)
    return Receipt(id, round, duplicate=False)


def _keep(
    state: DaemonState, source: str, key: str, answered: tuple[Batch | None, DecodedRows, Prediction, int]
) -> str:
    """Keep an answer durably, with all that scores it later, and return its id; see ``keep_prediction``.

    The id is that of the task which the rows become once their labels are known.
    """
    limits, id = state.config.serve.limits, make_entity_id(source, key, f"p{token_hex(8)}")
    wire.check_id(id, limits)
    known, decoded, prediction, round = answered
    support = {} if known is None else wire.name_fields("support", known)
    tensors = {**support, **name_tensors("query_x", decoded.x), **name_prediction(prediction)}
    targets = None if decoded.table is None else json.dumps(write_state(select_targets(decoded.table)))
    outcomes = json.dumps(name_outcomes(prediction, state.config.model))
    seen = 0 if known is None else count_samples(known)
    kept = Kept(id, key, round, count_samples(decoded.batch), seen, targets, outcomes, save_tensors(tensors))
    room = Room(limits.kept_predictions, limits.kept_prediction_bytes, limits.kept_prediction_days)
    with state.observing:
        keep_prediction(state.history, kept, room, time.time())
    return id


def _take_labels(state: DaemonState, key: str, body: dict[str, Any]) -> JSONResponse:
    """Make the round of a kept prediction from its labels, scored by the stored answer; see ``observe``."""
    id, labels = body["prediction"], body.get("labels")
    kept = find_prediction(state.history, id, key) if isinstance(id, str) else None
    if kept is None:
        detail = f"no prediction {str(id)[:200]!r} of this entity is kept: it was never kept, or was dropped or erased"
        return JSONResponse({"reason": "unknown_prediction", "detail": detail}, 404)
    if "rows" in body or not isinstance(labels, list):
        raise Rejected("unreadable", 'send {"prediction": "...", "labels": [...]}, and rows in a request of their own')
    if len(labels) != kept.rows:
        detail = f"the prediction {id} has {kept.rows} rows, and there are {len(labels)} labels: send one for each row"
        raise Rejected("wrong_shape", detail)
    y = encode_labels(state, kept, labels)
    digest = sha256(y).digest()
    with state.observing:
        kept = find_prediction(state.history, id, key) or kept  # Another request may have brought the labels.
        round, loss, new = state.history.find(id), kept.loss, False
        if round is None:
            task, loss = _score_stored_answer(state, kept, y)
            note_labels(state.history, id, digest, loss)
            source = str(_find_source(state))
            answer = state.ingest.submit(Arrival(id, wire.encode(task), source, None), wait=False).result()
            round, new = answer.round, not isinstance(answer, Conflict)
            kept = kept._replace(labels=digest if new else None)
        if kept.labels != digest:
            detail = f"the prediction {id} has other labels already, and is round {round}: the first ones hold"
            return JSONResponse({"reason": "conflict", "detail": detail}, 409)
        drop_prediction_body(state.history, id)
        waiting = sum(one.rows for one in list_waiting(state.history, key))
    found = {"entity": key, "new": kept.rows if new else 0, "waiting": waiting, "task": {"id": id, "round": round}}
    return JSONResponse({**found, "loss": loss}, 201 if new else 200)


def _score_stored_answer(state: DaemonState, kept: Kept, y: bytes) -> tuple[Task, float | None]:
    """Return the task of a kept prediction with its labels, and the loss of the stored answer; None if not finite."""
    spec, limits = state.config.task, state.config.serve.limits
    assert kept.body is not None
    tensors = load(kept.body)
    x = wire.gather_tensors(tensors, "query_x")
    body = save_tensors({**name_tensors("support_x", x), **name_tensors("query_x", x), **load(y)})
    try:
        query, _ = wire.decode_support(body, spec, limits)
    except Rejected as error:
        raise Rejected(error.reason, error.detail.replace("support_y", "labels")) from error
    task = Task(wire.gather_batch(tensors, "support"), query) if kept.seen else wire.hold_out(query, spec)
    prediction = restore_prediction(tensors, json.loads(kept.about))
    with model_error_context(), torch.no_grad():
        loss = float(loss_of(prediction, query.y))
    return task, loss if math.isfinite(loss) else None
