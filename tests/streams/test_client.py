"""The client of the HTTP API, against a server that answers as told; ``tests/deploy/test_client.py`` has a daemon."""

import asyncio
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load

from streams.client import Adaptation, AsyncClient, Client, DaemonError, RoundStatus, Verdict
from streams.types import Receipt

ROOT = Path(__file__).parents[2]
URL = "http://daemon.example:8780"
TASK = {"support_x": [[0.3], [-0.5]], "support_y": [[0.6], [0.8]]}
RECEIPT = httpx.Response(201, json={"id": "a", "round": 4})


class Scripted:
    """Answers requests in order, and records them and the waits between them."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers, self.seen, self.waits = list(answers), list[httpx.Request](), list[float]()

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.seen.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)

    async def wait(self, seconds: float) -> None:
        self.waits.append(seconds)


Ask = Callable[[Any], Any]
Play = Callable[..., Any]


def play_sync(script: Scripted, ask: Ask, **options: Any) -> Any:
    http = httpx.Client(transport=httpx.MockTransport(script.answer))
    with Client(URL, http=http, sleep=script.waits.append, **options) as client:
        return ask(client)


def play_async(script: Scripted, ask: Ask, **options: Any) -> Any:
    async def run() -> Any:
        http = httpx.AsyncClient(transport=httpx.MockTransport(script.answer))
        async with AsyncClient(URL, http=http, sleep=script.wait, **options) as client:
            return await ask(client)

    return asyncio.run(run())


@pytest.fixture(params=[play_sync, play_async], ids=["sync", "async"])
def play(request: pytest.FixtureRequest) -> Play:
    found: Play = request.param
    return found


@pytest.mark.parametrize("make", [lambda v: v, np.array, torch.tensor], ids=["lists", "numpy", "torch"])
def test_a_task_may_be_lists_arrays_or_tensors(play: Play, make: Callable[[Any], Any]) -> None:
    script = Scripted(RECEIPT)
    receipt = play(script, lambda client: client.submit({name: make(value) for name, value in TASK.items()}, id="a"))
    assert receipt == Receipt("a", 4, duplicate=False)
    (request,) = script.seen
    assert (request.method, str(request.url)) == ("POST", f"{URL}/v1/tasks")
    assert request.headers["Content-Type"] == "application/json"
    assert request.headers["Idempotency-Key"] == "a"
    sent = json.loads(request.content)
    assert sent.keys() == TASK.keys()
    for name, values in TASK.items():
        np.testing.assert_allclose(sent[name], values, rtol=1e-6)


def test_named_inputs_and_numbers_of_numpy_in_lists_are_written(play: Play) -> None:
    script = Scripted(RECEIPT)
    task = {"support_x": {"tokens": np.array([[1, 2]]), "mask": [[1, 0]]}, "support_y.tags": [np.float32(0.5)]}
    play(script, lambda client: client.submit(task))
    sent = json.loads(script.seen[0].content)
    assert sent == {"support_x.tokens": [[1, 2]], "support_x.mask": [[1, 0]], "support_y.tags": [0.5]}
    assert script.seen[0].headers["Idempotency-Key"] == hashlib.sha256(script.seen[0].content).hexdigest()


def test_arrays_may_be_sent_as_safetensors(play: Play) -> None:
    script = Scripted(RECEIPT)
    task = {"support_x": torch.ones(3, 2).T.requires_grad_(), "support_y": np.arange(2)}
    play(script, lambda client: client.submit(task, safetensors=True))
    assert script.seen[0].headers["Content-Type"] == "application/octet-stream"
    sent = load(script.seen[0].content)
    assert torch.equal(sent["support_x"], torch.ones(2, 3))
    assert sent["support_y"].tolist() == [0, 1]


def test_what_is_no_number_is_refused_before_it_is_sent(play: Play) -> None:
    script = Scripted(RECEIPT)
    with pytest.raises(ValueError, match="no NaN and no infinite numbers"):
        play(script, lambda client: client.submit({"support_x": np.array([np.nan])}))
    with pytest.raises(TypeError, match="object is neither a number, a list nor an array"):
        play(script, lambda client: client.submit({"support_x": object()}))
    assert script.seen == []


@pytest.mark.parametrize(
    ("failure", "least"),
    [
        (httpx.ConnectError("refused"), 0.0),
        (httpx.ReadError("cut"), 0.0),
        (httpx.RemoteProtocolError("cut"), 0.0),
        (httpx.ReadTimeout("slow"), 0.0),
        (httpx.Response(429, headers={"Retry-After": "7"}, json={"reason": "backlog_full", "detail": "full"}), 7.0),
        (httpx.Response(503, headers={"Retry-After": "5"}, json={"reason": "draining", "detail": "ends"}), 5.0),
        (httpx.Response(502, text="bad gateway"), 0.0),
        (httpx.Response(507, headers={"Retry-After": "10"}, json={"reason": "disk_full", "detail": "full"}), 10.0),
    ],
    ids=["refused", "cut", "hung up", "slow", "429", "503", "502", "507"],
)
def test_a_call_is_repeated_unchanged_until_it_is_answered(
    play: Play, failure: httpx.Response | Exception, least: float
) -> None:
    script = Scripted(failure, failure, httpx.Response(200, json={"id": "a", "round": 4}))
    assert play(script, lambda client: client.submit(TASK, id="a")) == Receipt("a", 4, duplicate=True)
    assert len({(one.content, one.headers["Idempotency-Key"]) for one in script.seen}) == 1
    assert len(script.seen) == 3
    assert [least <= wait <= least + 0.25 * 2**at for at, wait in enumerate(script.waits)] == [True, True]


@pytest.mark.parametrize("status", [401, 404, 409, 413, 422])
def test_a_refusal_is_not_repeated(play: Play, status: int) -> None:
    script = Scripted(httpx.Response(status, json={"reason": "why", "detail": "a sentence"}))
    with pytest.raises(DaemonError, match="why \\(HTTP") as caught:
        play(script, lambda client: client.submit(TASK))
    assert (caught.value.status, caught.value.reason, caught.value.detail) == (status, "why", "a sentence")
    assert (len(script.seen), script.waits) == (1, [])


def test_attempts_end_in_time(play: Play) -> None:
    script = Scripted(httpx.ConnectError("refused"))
    with pytest.raises(DaemonError, match="unreachable: ConnectError: refused"):
        play(script, lambda client: client.submit(TASK), retry_seconds=0)
    assert len(script.seen) == 1
    script = Scripted(httpx.Response(429, headers={"Retry-After": "60"}, json={"reason": "full", "detail": "full"}))
    with pytest.raises(DaemonError, match="full") as caught:
        play(script, lambda client: client.submit(TASK), retry_seconds=30)
    assert (caught.value.retry_after, script.waits) == (60.0, [])


def test_waits_grow_to_a_limit(play: Play) -> None:
    script = Scripted(*[httpx.ConnectError("refused")] * 40, RECEIPT)
    play(script, lambda client: client.submit(TASK), retry_seconds=10_000)
    assert max(script.waits[:3]) <= 1.0
    assert 1.0 < max(script.waits) <= 15.0


def test_another_server_is_noticed(play: Play) -> None:
    for answer in (httpx.Response(200, text="hello"), httpx.Response(200, json=[1]), httpx.Response(200, json={})):
        with pytest.raises(DaemonError, match="is not an online-meta daemon"):
            play(Scripted(answer), lambda client: client.submit(TASK))


VERDICT = {"state": "pays", "sentence": "It pays.", "gain": 0.5, "interval": [0.25, 0.75], "weights": {}}
ROUND = {"status": "learned", "round": 3, "loss_before": 1.5, "loss_after": None, "entity": "x"}
CALLS: dict[str, tuple[Ask, dict[str, Any], str, Any]] = {
    "status": (lambda c: c.status(), {"state": "idle"}, "GET /v1/status", {"state": "idle"}),
    "regret": (
        lambda c: c.regret(first=2, to=5, points=3),
        {"rounds": []},
        "GET /v1/regret?from=2&to=5&points=3",
        {"rounds": []},
    ),
    "all regret": (lambda c: c.regret(), {}, "GET /v1/regret?from=0&points=1000", {}),
    "verdict": (
        lambda c: c.verdict(),
        VERDICT,
        "GET /v1/verdict",
        Verdict("pays", "It pays.", 0.5, (0.25, 0.75), VERDICT),
    ),
    "early verdict": (
        lambda c: c.verdict(),
        VERDICT | {"interval": None, "gain": None},
        "GET /v1/verdict",
        Verdict("pays", "It pays.", None, None, VERDICT | {"interval": None, "gain": None}),
    ),
    "task": (lambda c: c.task("a:b/c"), ROUND, "GET /v1/tasks/a%3Ab%2Fc", RoundStatus("learned", 3, 1.5, None)),
    "adapt": (
        lambda c: c.adapt(TASK | {"query_x": [[1]]}),
        {"round": 9, "predictions": [[1.5]], "labels": [0]},
        "POST /v1/adapt",
        Adaptation(9, [[1.5]], [0], {"predictions": [[1.5]], "labels": [0]}),
    ),
    "entity": (
        lambda c: c.entity("Café 9/7"),
        {"rows": 4},
        "GET /v1/entities/Caf%C3%A9%209%2F7?points=1000",
        {"rows": 4},
    ),
    "predict": (
        lambda c: c.predict("Café 9/7", [{"price": 2}]),
        {"mean": [1.0]},
        "POST /v1/entities/Caf%C3%A9%209%2F7/predict",
        {"mean": [1.0]},
    ),
    "keep": (
        lambda c: c.predict("9/7", [{"price": 2}], keep=True),
        {"prediction": "http..9_2f7..p0"},
        "POST /v1/entities/9%2F7/predict",
        {"prediction": "http..9_2f7..p0"},
    ),
    "label": (
        lambda c: c.label("http..Caf_c3_a9_209_2f7..p0", np.array([1.5])),
        {"loss": 0.5},
        "POST /v1/entities/Caf%C3%A9%209%2F7/observe",
        {"loss": 0.5},
    ),
}
BODIES = {
    "predict": {"rows": [{"price": 2}]},
    "keep": {"rows": [{"price": 2}], "keep": True},
    "label": {"prediction": "http..Caf_c3_a9_209_2f7..p0", "labels": [1.5]},
}


@pytest.mark.parametrize("name", CALLS)
def test_each_method_asks_and_reads_what_it_says(play: Play, name: str) -> None:
    ask, content, asked, result = CALLS[name]
    script = Scripted(httpx.Response(200, json=content))
    assert play(script, ask, token="secret") == result
    (request,) = script.seen
    assert f"{request.method} {request.url.raw_path.decode()}" == asked
    assert (request.headers["Authorization"], request.headers["Accept"]) == ("Bearer secret", "application/json")
    if name in BODIES:
        assert json.loads(request.content) == BODIES[name]


def test_what_is_no_id_of_a_prediction_is_refused_before_it_is_sent(play: Play) -> None:
    with pytest.raises(ValueError, match="'task-7' is not the id of a kept prediction"):
        play(Scripted(), lambda client: client.label("task-7", [1]))


def test_a_daemon_that_keeps_no_more_predictions_is_not_asked_again(play: Play) -> None:
    script = Scripted(httpx.Response(507, json={"reason": "predictions_full", "detail": "a sentence"}))
    with pytest.raises(DaemonError, match="predictions_full \\(HTTP 507"):
        play(script, lambda client: client.predict("shop", [{"x": 1}], keep=True))
    assert len(script.seen) == 1


@pytest.mark.parametrize("url", ["daemon:8780", "ftp://daemon", "http://", "http://me@daemon", "http://daemon?x=1"])
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_an_address_that_is_none_is_refused(kind: type, url: str) -> None:
    with pytest.raises(ValueError, match="the address of a daemon"):
        kind(url)


PROGRAM = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "numpy", "safetensors", "online_meta"):
            raise ImportError(f"{name} is not here")
sys.meta_path.insert(0, Blocked())
import httpx
from streams.client import AsyncClient, Client
answer = httpx.MockTransport(lambda request: httpx.Response(201, json={"id": "a", "round": 0}))
print(Client("http://x", http=httpx.Client(transport=answer)).submit({"support_x": [[1]]}).round)
"""


def test_the_client_needs_neither_torch_nor_numpy() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_the_client_runs_where_httpx_alone_is_installed(tmp_path: Path) -> None:
    """Without the packages of this environment; the folder has links to httpx and what it needs."""
    for name in ("httpx", "httpcore", "h11", "certifi", "idna", "anyio", "sniffio", "typing_extensions"):
        spec = find_spec(name)
        if spec is not None and spec.origin is not None:
            origin = Path(spec.origin)
            found = origin.parent if origin.name == "__init__.py" else origin
            (tmp_path / found.name).symlink_to(found)
    (tmp_path / "streams").symlink_to(ROOT / "streams")
    program = PROGRAM.partition("sys.meta_path")[2].partition("\n")[2]
    environment = {"PYTHONPATH": str(tmp_path), "PATH": os.environ["PATH"]}
    command = [sys.executable, "-S", "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert (done.stdout, done.stderr) == ("0\n", "")
