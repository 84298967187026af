"""The read side of the API: predictions, weights, regret, health, and its own description."""

import itertools
import json
import math
import re
from typing import Any

import httpx
import pytest
import torch
from openapi_spec_validator import validate
from safetensors.torch import load
from torch import nn

from tests.support.daemon import Daemon, decode, encode, sinusoid, wait_for


def rounds_of(daemon: Daemon) -> list[dict[str, Any]]:
    """Return the records of all rounds, once none is pending."""
    daemon.wait_until_learned(daemon.status()["rounds"]["ingested"])
    return [json.loads(line) for line in (daemon.log.parent / "run/rounds.jsonl").read_text().splitlines()]


def regret(daemon: Daemon, **query: int) -> dict[str, Any]:
    answer = daemon.client.get("/v1/regret", params=query)
    assert answer.status_code == 200
    found: dict[str, Any] = answer.json()
    return found


def adapt(daemon: Daemon, t: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return (predictions, plain torch's predictions from /v1/weights, the round) for a task of the stream."""
    task = decode(sinusoid(t))
    body = encode({"support_x": task.support.x, "support_y": task.support.y, "query_x": task.query.x})
    answer, weights = daemon.client.post("/v1/adapt", content=body), daemon.client.get("/v1/weights")
    assert (answer.status_code, weights.status_code) == (200, 200)
    assert answer.headers["X-Online-Meta-Round"] == weights.headers["X-Online-Meta-Round"]
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1))
    model.load_state_dict(load(weights.content))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(task.support.x), task.support.y).backward()
        optimizer.step()
    return (
        load(answer.content)["predictions"],
        model(task.query.x).detach(),
        int(weights.headers["X-Online-Meta-Round"]),
    )


def test_predictions_use_the_current_weights_after_two_steps(daemon: Daemon) -> None:
    rounds = len(rounds_of(daemon))
    wait_for("the newest leader answers", lambda: adapt(daemon, 1000)[2] == rounds)
    predictions, expected, round = adapt(daemon, 1000)
    assert round == rounds
    torch.testing.assert_close(predictions, expected, rtol=1e-5, atol=1e-6)
    assert len(rounds_of(daemon)) == rounds, "adapting stored something"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"query_y": torch.zeros(5, 1)}, "unknown_tensor"),
        ({"query_x": torch.zeros(5, 2)}, "wrong_shape"),
        ({"support_y": torch.full((5, 1), math.nan)}, "not_finite"),
    ],
)
def test_an_invalid_adapt_request_is_refused(daemon: Daemon, change: dict[str, torch.Tensor], reason: str) -> None:
    task = decode(sinusoid(1000))
    good = {"support_x": task.support.x, "support_y": task.support.y, "query_x": task.query.x}
    answer = daemon.client.post("/v1/adapt", content=encode({**good, **change}))
    assert (answer.status_code, answer.json()["reason"]) == (422, reason)


def test_the_ledger_is_the_sum_of_the_rounds(daemon: Daemon) -> None:
    lines = rounds_of(daemon)
    status = daemon.wait_until_compared(len(lines))
    found = regret(daemon)
    assert (found["from"], found["to"], found["rounds"]) == (0, len(lines), list(range(len(lines))))
    assert found["loss_before"] == [line["loss_before"] for line in lines]
    assert found["loss_after"] == [line["loss_after"] for line in lines]
    assert found["accuracy"] == [None] * len(lines)
    losses = {name: [line["learners"][name]["loss_after"] for line in lines] for name in ("ftml", "from_scratch")}
    for name, values in losses.items():
        assert found["learners"][name]["cumulative_loss"][-1] == pytest.approx(math.fsum(values), rel=1e-12)
        assert found["learners"][name]["loss"] == pytest.approx(values, rel=1e-9)
    ahead = math.fsum(losses["ftml"]) - math.fsum(losses["from_scratch"])
    assert found["regret"]["from_scratch"]["value"] == pytest.approx(ahead, rel=1e-9)
    assert found["regret"] == status["regret"]
    last = found["comparators"][-1]
    assert (last["kind"], last["as_of_round"]) == ("hindsight", len(lines))
    assert found["regret"]["hindsight"]["value"] == pytest.approx(math.fsum(losses["ftml"]) - last["cumulative_loss"])


def test_ranges_and_buckets_of_the_ledger(daemon: Daemon) -> None:
    lines = rounds_of(daemon)
    after = [line["loss_after"] for line in lines]
    part = regret(daemon, **{"from": 2, "to": 5})
    assert (part["from"], part["to"], part["rounds"], part["loss_after"]) == (2, 5, [2, 3, 4], after[2:5])
    assert part["learners"]["ftml"]["cumulative_loss"] == pytest.approx([math.fsum(after[:n]) for n in (3, 4, 5)])
    one = regret(daemon, points=1)
    assert one["rounds"] == [len(lines) - 1]
    assert one["loss_after"] == pytest.approx([math.fsum(after) / len(after)])
    thin = regret(daemon, points=3)
    edges = [-1, *thin["rounds"]]
    assert thin["rounds"][-1] == len(lines) - 1
    spans = [after[low + 1 : high + 1] for low, high in itertools.pairwise(edges)]
    assert thin["loss_after"] == pytest.approx([math.fsum(span) / len(span) for span in spans])
    assert regret(daemon, to=10**9)["to"] == len(lines)


@pytest.mark.parametrize("query", [{"from": 10**9}, {"from": 5, "to": 2}, {"from": 3, "to": 3}, {"to": 0}])
def test_an_empty_range_is_empty(daemon: Daemon, query: dict[str, int]) -> None:
    found = regret(daemon, **query)
    assert found["from"] == found["to"]
    assert (found["rounds"], found["loss_after"], found["comparators"]) == ([], [], [])
    keys = ("loss", "rounds", "charged_rounds", "accuracy", "accuracy_rounds", "cumulative_loss")
    assert found["learners"]["ftml"] == {key: [] for key in keys}


@pytest.mark.parametrize("query", ["points=0", "points=10001", "from=-1", "to=-1", "from=x", "points=1.5"])
def test_an_invalid_range_is_refused(daemon: Daemon, query: str) -> None:
    answer = daemon.client.get(f"/v1/regret?{query}")
    assert (answer.status_code, answer.json()["reason"]) == (422, "bad_parameter")
    assert answer.json()["detail"].startswith(f"{query.split('=')[0]}: ")


def test_the_verdict(daemon: Daemon) -> None:
    rounds = len(rounds_of(daemon))
    found = daemon.client.get("/v1/verdict").json()
    assert found == daemon.status()["verdict"]
    assert (found["state"], found["reference"]) == ("too_early", "pool")
    assert found["best_without"].partition("@")[0] == "from_scratch"
    assert math.fsum(found["weights"].values()) == pytest.approx(1.0)
    assert (found["rounds"], found["interval"]) == (rounds, None)
    assert found["sentence"].endswith(f"{rounds} rounds are scored, and an interval needs 50.")
    assert found["seconds_per_round"].keys() == {"ftml", "from_scratch", "pool"}
    assert min(found["seconds_per_round"].values()) > 0


def test_health(daemon: Daemon) -> None:
    assert daemon.client.get("/healthz").json() == {"status": "alive"}
    assert daemon.client.get("/readyz").json() == {"status": "ready"}


@pytest.mark.parametrize(
    ("method", "path", "code", "reason"),
    [("GET", "/v2/tasks", 404, "not_found"), ("DELETE", "/v1/tasks", 405, "wrong_method")],
)
def test_an_unknown_path_or_method_gets_a_json_error(
    daemon: Daemon, method: str, path: str, code: int, reason: str
) -> None:
    answer = daemon.client.request(method, path)
    assert (answer.status_code, answer.json()["reason"]) == (code, reason)
    assert path in answer.json()["detail"]


def test_the_api_describes_itself(daemon: Daemon) -> None:
    described = daemon.client.get("/openapi.json").json()
    assert "Duplicate Operation ID" not in daemon.log.read_text(), "a route is defined twice"
    validate(described)
    assert {"/v1/tasks", "/v1/tasks/{id}", "/v1/adapt", "/v1/weights", "/v1/regret", "/v1/status"} <= set(
        described["paths"]
    )
    responses = described["paths"]["/v1/tasks"]["post"]["responses"]
    assert {"200", "201", "409", "413", "422", "429", "503", "507"} <= set(responses)


def test_the_api_documentation_loads_nothing_from_other_hosts(daemon: Daemon) -> None:
    page = daemon.client.get("/docs")
    assert page.status_code == 200
    hosts = set(re.findall(r"""(?:src|href)=["']?(https?:)?//([^/"']+)""", page.text))
    assert hosts == set()
    parts = re.findall(r"""(?:src|href)=["']([^"']+)""", page.text)
    assert len(parts) >= 2
    for part in parts:
        answer = daemon.client.get(httpx.URL(daemon.url).join(part))
        assert answer.status_code == 200, part
        assert len(answer.content) > 100


@pytest.mark.parametrize("path", ["/", "/docs", "/v1/status", "/metrics", "/v1/tasks/never", "/no", "/static/app.js"])
def test_the_content_security_policy_allows_no_other_host(daemon: Daemon, path: str) -> None:
    headers = daemon.client.get(path).headers
    assert headers["X-Content-Type-Options"] == "nosniff"
    policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"].split()[0] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert "http" not in headers["Content-Security-Policy"]
    assert ("'unsafe-inline'" in policy["default-src"]) == (path == "/docs")
