"""Routes that tell: health, status, regret, metrics, weights, the fate of a task."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from deploy.routes_tasks import ERROR, TENSOR_RESPONSE, TENSORS
from deploy.series import regret_series
from deploy.state import DaemonState, status_of
from trainers.desk import encode_leader

router = APIRouter()


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
