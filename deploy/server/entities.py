"""The routes of the HTTP API on entities: what the run knows of one, such as a store or a patient."""

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse

from deploy.server.descriptions import ERROR
from deploy.server.routes import describe_round
from deploy.server.state import DaemonState
from online_meta.batches import count_samples
from streams.history.entity_rounds import find_rounds, read_rows
from streams.history.errors import RoundDiscarded

router = APIRouter()

Key = Annotated[str, Path(description="the key of the entity, percent-encoded", min_length=1, max_length=1000)]


@router.get("/v1/entities/{key:path}", responses={404: {"description": "The run has no task of this entity", **ERROR}})
def show_entity(
    request: Request,
    key: Key,
    points: Annotated[int, Query(ge=0, le=10_000, description="the largest number of rounds listed")] = 1000,
) -> Any:
    """Return what the run knows of an entity: the number of its `rows`, and its rounds with their losses.

    `rounds` lists the newest ones, oldest first, of `total` rounds from `first_round` to `last_round`. A row that
    several tasks have, because the support of the later ones is the entity's own past, counts once. `rows` is null if
    retention has removed one of the rounds.
    """
    state: DaemonState = request.app.state.daemon
    found = find_rounds(state.history, key)
    if not found:
        detail = f"no task of an entity {key!r} was accepted: the id of such a task is SOURCE..KEY..AT"
        return JSONResponse({"reason": "unknown_entity", "detail": detail}, 404)
    state.refresh()
    return {
        "entity": key,
        "rows": _count_rows(state, found),
        "total": len(found),
        "first_round": found[0],
        "last_round": found[-1],
        "rounds": [_show_round(state, round) for round in found[max(len(found) - points, 0) :]],
    }


def _count_rows(state: DaemonState, rounds: list[int]) -> int | None:
    try:
        rows = read_rows(state.history, rounds)
    except RoundDiscarded:
        return None
    return 0 if rows is None else count_samples(rows)


def _show_round(state: DaemonState, round: int) -> dict[str, Any]:
    entry = state.history.entry(round)
    return {"id": entry.id, "source": entry.source, "arrived": entry.arrived, **describe_round(state, round)}
