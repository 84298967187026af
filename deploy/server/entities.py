"""The routes of the HTTP API on entities, such as stores or patients: what is known of one, predictions, new rows."""

import json
from dataclasses import replace
from hashlib import sha256
from typing import Annotated, Any

import torch
from anyio import to_thread
from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.responses import JSONResponse
from safetensors.torch import save
from torch import Tensor

from deploy.server.descriptions import ERROR, TASK_RESPONSES
from deploy.server.limits import read_body
from deploy.server.routes import describe_round
from deploy.server.state import DaemonState
from online_meta.batches import count_samples, select_samples
from online_meta.prediction import cdf_of, mean_of, probabilities_of
from online_meta.types import Batch, Prediction, Task, Tensors
from streams.entities import make_entity_id
from streams.formats import wire
from streams.formats.json_body import encode_json, make_example, tensors_to_json
from streams.history.entity_rounds import find_rounds, read_rows
from streams.history.errors import RoundDiscarded
from streams.history.observations import assign_task, drop_bodies, join_rows, keep_rows, list_waiting
from streams.sources.http import Settings
from streams.types import Arrival, BacklogFull, Receipt, Rejected

router = APIRouter()

Key = Annotated[str, Path(description="the key of the entity, percent-encoded", min_length=1, max_length=1000)]
LEVEL = 0.9
"""The probability that an interval of a prediction has."""
_BISECTIONS, _DOUBLINGS = 60, 60
_NO_LIMIT = 1 << 62
_ROWS: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": {"rows": {"type": "array", "items": {"type": "object"}}},
                    "required": ["rows"],
                }
            }
        },
    }
}
_ERRORS: dict[int | str, dict[str, Any]] = {status: TASK_RESPONSES[status] for status in (408, 413, 415, 422, 429)}
_PREDICT: dict[int | str, dict[str, Any]] = {
    **_ERRORS,
    503: {"description": "No meta-parameters have been published yet", **ERROR},
}
_OBSERVE: dict[int | str, dict[str, Any]] = {
    **_ERRORS,
    200: {"description": "The rows are durable already"},
    201: {"description": "The rows are durable"},
    404: {"description": "This daemon does not accept rows over HTTP", **ERROR},
    507: TASK_RESPONSES[507],
}


@router.get("/v1/entities/{key:path}", responses={404: {"description": "The run has nothing of this entity", **ERROR}})
def show_entity(
    request: Request,
    key: Key,
    points: Annotated[int, Query(ge=0, le=10_000, description="the largest number of rounds listed")] = 1000,
) -> Any:
    """Return what the run knows of an entity: the number of its `rows`, and its rounds with their losses.

    `rounds` lists the newest ones, oldest first, of `total` rounds from `first_round` to `last_round`. A row that
    several tasks have, because the support of the later ones is the entity's own past, counts once. `waiting` rows were
    observed and are in no task yet; they count, too. `rows` is null if retention has removed one of the rounds.
    """
    state: DaemonState = request.app.state.daemon
    found, waiting = find_rounds(state.history, key), list_waiting(state.history, key)
    if not found and not waiting:
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


@router.post("/v1/entities/{key:path}/predict", responses=_PREDICT, openapi_extra=_ROWS)
async def predict(request: Request, key: Key) -> Response:
    """Predict the targets of `rows` of an entity, after adapting to what is known of it: `{"rows": [{"x": [0.5]}]}`.

    The support set are the newest known rows, at most `past_rows` of `[[source]] kind = "http"`; `rows` says how many.
    The answer has the `mean` of each target, or of classes the `probabilities` and the `labels`. Where the outcome has
    a distribution function, `interval` has the bounds `low` and `high` between which a target lies with a probability
    of `level`. Nothing is stored.
    """
    state: DaemonState = request.app.state.daemon
    rows = await _read_json_rows(request)

    def answer() -> dict[str, Any]:
        known = _read_known(state, key, _find_settings(state).past_rows)
        like, query_x = _decode(state, rows, targets=False)
        example = select_samples(like, slice(0, 0)) if known is None else known
        prediction, round = state.adapter.predict(example, query_x)
        count = 0 if known is None else count_samples(known)
        return {"entity": key, "rows": count, "round": round, **_prediction_to_json(prediction)}

    try:
        return JSONResponse(await to_thread.run_sync(answer, limiter=request.app.state.adapting))
    except FileNotFoundError:
        detail = "the trainer has not published its first parameters yet: try again later"
        return JSONResponse({"reason": "not_ready", "detail": detail}, 503, headers={"Retry-After": "1"})


@router.post("/v1/entities/{key:path}/observe", status_code=201, responses=_OBSERVE, openapi_extra=_ROWS)
async def observe(request: Request, key: Key, idempotency_key: Annotated[str | None, Header()] = None) -> Response:
    """Take new rows of an entity: `{"rows": [{"x": [0.5], "y": [1]}]}`. They are durable when the response is sent.

    Once `min_rows` of `[[source]] kind = "http"` wait, they become a task: the rows known before are its support set
    and the new ones its query set. The first task of an entity holds out. `task` has its id and round, or is null. Rows
    that are sent again with the same header `Idempotency-Key` count once; the default is the SHA-256 of the rows.
    """
    state: DaemonState = request.app.state.daemon
    source = next((source.name for source in state.config.source if source.kind == "http"), None)
    if source is None:
        detail = 'this daemon does not accept rows over HTTP: add [[source]] kind = "http" to its configuration'
        return JSONResponse({"reason": "no_http_source", "detail": detail}, 404)
    rows = await _read_json_rows(request)
    name = idempotency_key or sha256(json.dumps(rows).encode()).hexdigest()

    def take() -> dict[str, Any]:
        batch, _ = _decode(state, rows, targets=True)
        with state.observing:
            new = keep_rows(state.history, key, name, batch, len(rows))
            receipt = _make_task(state, source, key)
            waiting = sum(one.rows for one in list_waiting(state.history, key))
        task = None if receipt is None else {"id": receipt.id, "round": receipt.round}
        return {"entity": key, "new": len(rows) if new else 0, "waiting": waiting, "task": task}

    wire.check_id(make_entity_id(source, key, "0" * 20), state.config.serve.limits)
    answer = await to_thread.run_sync(take)
    return JSONResponse(answer, 201 if answer["new"] else 200)


async def _read_json_rows(request: Request) -> list[dict[str, Any]]:
    """Return the rows in the body of a request; raises ``Rejected`` if there are none."""
    with request.app.state.body_budget.reserve() as reservation:
        body = await read_body(request, reservation)
    limits = request.app.state.daemon.config.serve.limits
    if len(body) > limits.json_bytes:
        raise Rejected("too_large", f"the body has {len(body)} bytes; at most {limits.json_bytes} are accepted")
    try:
        rows = json.loads(body)["rows"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Rejected("unreadable", 'the body is not JSON such as {"rows": [{"x": [0.5], "y": [1]}]}') from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise Rejected("unreadable", '"rows" must be a list of one or more objects, such as [{"x": [0.5], "y": [1]}]')
    return rows


def _decode(state: DaemonState, rows: list[dict[str, Any]], *, targets: bool) -> tuple[Batch, Tensors]:
    """Return rows as a batch, and their inputs; without ``targets`` the batch has arbitrary ones of the right shape."""
    spec, limits = state.config.task, state.config.serve.limits
    allowed = {"x", "y"} if targets else {"x"}
    for at, row in enumerate(rows):
        if set(row) != allowed:
            needed = " and ".join(f'"{name}"' for name in sorted(allowed))
            raise Rejected("missing_tensor", f"row {at} has {', '.join(map(repr, row))}; it needs {needed} and no more")
    fields = _stack("support_x", [row["x"] for row in rows]) | _stack("query_x", [row["x"] for row in rows])
    if targets:
        fields |= _stack("support_y", [row["y"] for row in rows])
    else:
        example = make_example(spec).items()
        fields |= {name: value[:1] * len(rows) for name, value in example if name.startswith("support_y")}
    body = encode_json(json.dumps(fields).encode(), spec, replace(limits, json_bytes=_NO_LIMIT))
    return wire.decode_support(body, spec, limits)


def _stack(name: str, values: list[Any]) -> dict[str, list[Any]]:
    """Return the values of all rows under the name of the tensor, or of each named one."""
    if not isinstance(values[0], dict):
        return {name: values}
    names = list(values[0])
    if not all(isinstance(value, dict) and list(value) == names for value in values):
        raise Rejected("missing_tensor", f"each row must have the same names in the same order: {', '.join(names)}")
    return {f"{name}.{key}": [value[key] for value in values] for key in names}


def _find_settings(state: DaemonState) -> Settings:
    return next((one.settings for one in state.config.source if one.kind == "http"), Settings())


def _make_task(state: DaemonState, source: str, key: str) -> Receipt | None:
    """Submit the waiting rows of an entity as a task, if they are enough; return None if they wait on.

    Raises:
        Rejected: if the task is refused, for example because the model fails on it; its rows are then a dead letter.
    """
    settings, waiting = _find_settings(state), list_waiting(state.history, key)
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


def _prediction_to_json(prediction: Prediction) -> dict[str, Any]:
    """Return what a prediction says of each row: probabilities and labels, or the mean and an interval."""
    probabilities = probabilities_of(prediction)
    if probabilities is not None:
        labels = probabilities.argmax(1 if probabilities.dim() > 1 else 0)
        return _to_json({"probabilities": probabilities, "labels": labels})
    mean = mean_of(prediction)
    found = _to_json({"mean": mean})
    bounds = [_find_quantile(prediction, mean, (1 + side * LEVEL) / 2) for side in (-1, 1)]
    if isinstance(bounds[0], Tensor) and isinstance(bounds[1], Tensor):
        found["interval"] = {"level": LEVEL, **_to_json({"low": bounds[0], "high": bounds[1]})}
    return found


def _to_json(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return tensors_to_json(save({name: one.detach().cpu().contiguous().clone() for name, one in tensors.items()}))


def _find_quantile(prediction: Prediction, mean: Tensor, share: float) -> Tensor | None:
    """Return the value below which each target lies with probability ``share``, by bisection; None without a cdf."""
    low, high, width = mean.double(), mean.double(), 1.0
    if cdf_of(prediction, low) is None:
        return None
    for _ in range(_DOUBLINGS):  # until the bounds enclose the quantile
        below, above = (cdf_of(prediction, bound) for bound in (low, high))
        assert below is not None
        assert above is not None
        if bool((below <= share).all() and (above >= share).all()):
            break
        low, high, width = (
            torch.where(below > share, low - width, low),
            torch.where(above < share, high + width, high),
            2 * width,
        )
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        reached = cdf_of(prediction, middle)
        assert reached is not None
        low, high = torch.where(reached < share, middle, low), torch.where(reached < share, high, middle)
    return (low + high) / 2
