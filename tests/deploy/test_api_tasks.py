"""Tasks over HTTP: which are accepted, which are refused and why, and the status of each."""

import gzip
import hashlib
import json
import socket

import httpx
import pytest
import torch
import zstandard

from streams.ingest.dead_letters import read_letters
from tests.deploy.conftest import BODY_BYTES
from tests.support.daemon import Daemon, decode, encode, sinusoid, wait_for

GOOD = {
    "support_x": torch.zeros(3, 1),
    "support_y": torch.zeros(3, 1),
    "query_x": torch.zeros(2, 1),
    "query_y": torch.zeros(2, 1),
}

POST = "POST /v1/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"
"""The head of a request with tensors, up to its last headers."""


def test_a_task_becomes_one_round_however_often_it_is_sent(daemon: Daemon) -> None:
    first = daemon.post(sinusoid(100), "again")
    assert (first.status_code, first.json().keys()) == (201, {"id", "round"})
    second = daemon.post(sinusoid(100), "again")
    assert (second.status_code, second.json()) == (200, first.json())
    other = daemon.post(sinusoid(101), "again")
    assert (other.status_code, other.json()["reason"]) == (409, "conflict")
    assert other.json()["round"] == first.json()["round"]
    assert f"round {first.json()['round']}, which has a different body" in other.json()["detail"]


def test_rounds_are_dense_and_in_order(daemon: Daemon) -> None:
    rounds = [daemon.post(sinusoid(200 + t), f"dense-{t}").json()["round"] for t in range(4)]
    assert rounds == list(range(rounds[0], rounds[0] + 4))


def test_the_default_id_is_the_hash_of_the_body(daemon: Daemon) -> None:
    answer = daemon.post(sinusoid(300))
    assert (answer.status_code, answer.json()["id"]) == (201, hashlib.sha256(sinusoid(300)).hexdigest())
    assert daemon.post(sinusoid(300)).status_code == 200


def test_a_query_is_optional(daemon: Daemon) -> None:
    assert daemon.post(sinusoid(400, query=False), "no-query").status_code == 201
    wait_for("the task is learned", lambda: daemon.client.get("/v1/tasks/no-query").json()["status"] == "learned")


REFUSED: dict[str, tuple[dict[str, torch.Tensor] | bytes, str, str]] = {
    "no safetensors": (b"hello, is this a task?", "unreadable", "cannot be read as safetensors"),
    "nothing": (b"", "unreadable", "the body has 0 bytes"),
    "NaN": ({**GOOD, "support_x": torch.tensor([[0.0], [float("nan")]])[[0, 1, 0]]}, "not_finite", "at sample 1"),
    "infinity": ({**GOOD, "query_y": torch.full((2, 1), float("inf"))}, "not_finite", "query_y has NaN or infinity"),
    "shape": ({**GOOD, "support_x": torch.zeros(3, 2)}, "wrong_shape", "support_x has shape (3, 2); it must be (n, 1)"),
    "dtype": (
        {**GOOD, "query_x": torch.zeros(2, 1).double()},
        "wrong_dtype",
        "query_x has dtype 'F64'; it must be F32",
    ),
    "counts": ({**GOOD, "query_y": torch.zeros(3, 1)}, "wrong_shape", "query_x has 2 samples and query_y has 3"),
    "no support": (
        {**GOOD, "support_x": torch.zeros(0, 1), "support_y": torch.zeros(0, 1)},
        "empty_support",
        "no samp",
    ),
    "no query": ({**GOOD, "query_x": torch.zeros(0, 1), "query_y": torch.zeros(0, 1)}, "empty_query", "no samples"),
    "unknown": ({**GOOD, "weights": torch.zeros(1)}, "unknown_tensor", "unexpected tensor 'weights'; expected:"),
    "missing": ({"support_x": torch.zeros(3, 1)}, "missing_tensor", "the tensor 'support_y' is missing"),
    "half a query": (
        {k: v for k, v in GOOD.items() if k != "query_y"},
        "missing_tensor",
        "the tensor 'query_y' is missing",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_an_invalid_task_is_refused_without_side_effects(daemon: Daemon, why: str) -> None:
    body, reason, detail = REFUSED[why]
    before = daemon.status()["rounds"]["ingested"]
    answer = daemon.post(body if isinstance(body, bytes) else encode(body), f"refused-{reason}")
    assert (answer.status_code, answer.json()["reason"]) == (422, reason)
    assert detail in answer.json()["detail"]
    assert daemon.status()["rounds"]["ingested"] == before
    assert daemon.client.get(f"/v1/tasks/refused-{reason}").status_code == 404
    assert f'rejected_total{{reason="{reason}",source="http"}}' in daemon.client.get("/metrics").text


@pytest.mark.parametrize("id", ["", "a b", "-a", "a" * 201, "../etc", "ä".encode().decode("latin1")])
def test_an_invalid_id_is_refused(daemon: Daemon, id: str) -> None:
    headers = {"Idempotency-Key": id.encode("latin1")}
    answer = daemon.client.post("/v1/tasks", content=sinusoid(0), headers=headers)
    assert (answer.status_code, answer.json()["reason"]) == (422, "bad_id")


@pytest.mark.parametrize("framing", ["Content-Length: 10000000000", "Transfer-Encoding: chunked"])
def test_a_body_over_the_limit_is_refused_before_it_is_read_to_its_end(daemon: Daemon, framing: str) -> None:
    url = httpx.URL(daemon.url)
    with socket.create_connection((url.host, url.port), timeout=5) as connection:
        head = f"{POST}Idempotency-Key: big\r\n{framing}\r\n\r\n"
        connection.sendall(head.encode())
        piece = bytes(65536)
        sent = 0
        try:
            while sent < 200_000_000:
                connection.sendall(b"10000\r\n" + piece + b"\r\n" if "chunked" in framing else piece)
                sent += len(piece)
        except (TimeoutError, ConnectionError):
            pass  # the daemon has stopped reading
        assert connection.recv(12) == b"HTTP/1.1 413"
        assert sent < 50_000_000, "the daemon never stops reading"
    assert daemon.client.get("/healthz").is_success


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_answered(daemon: Daemon, chunked: bool) -> None:
    body = bytes(BODY_BYTES + 1)
    answer = daemon.client.post("/v1/tasks", content=iter([body[:9], body[9:]]) if chunked else body)
    assert (answer.status_code, answer.json()["reason"]) == (413, "too_large")
    assert str(BODY_BYTES) in answer.json()["detail"]
    assert 'rejected_total{reason="too_large",source="http"}' in daemon.client.get("/metrics").text


@pytest.mark.parametrize("encoding", ["zstd", "gzip"])
def test_a_compressed_body_is_the_same_task(daemon: Daemon, encoding: str) -> None:
    body = sinusoid({"zstd": 700, "gzip": 701}[encoding])
    packed = zstandard.compress(body) if encoding == "zstd" else gzip.compress(body)
    first = daemon.client.post("/v1/tasks", content=packed, headers={"Content-Encoding": encoding})
    assert (first.status_code, first.json()["id"]) == (201, hashlib.sha256(body).hexdigest())
    assert daemon.post(body).status_code == 200, "uncompressed, it is a duplicate"
    task = decode(body)
    request = {"support_x": task.support.x, "support_y": task.support.y, "query_x": task.query.x}
    squeeze = zstandard.compress if encoding == "zstd" else gzip.compress
    headers = {"Content-Encoding": encoding.upper()}
    daemon.wait_until_learned(1)
    answers = [
        daemon.client.post("/v1/adapt", content=encode(request)),
        daemon.client.post("/v1/adapt", content=squeeze(encode(request)), headers=headers),
    ]
    assert [answer.status_code for answer in answers] == [200, 200]


@pytest.mark.parametrize(
    ("body", "encoding", "status", "reason"),
    [
        (b"x", "br", 415, "unknown_encoding"),
        (b"x", "gzip, zstd", 415, "unknown_encoding"),
        (b"x", "gzip", 422, "bad_compression"),
        (zstandard.compress(sinusoid(0))[:-1], "zstd", 422, "bad_compression"),
        (zstandard.compress(sinusoid(0)) * 2, "zstd", 422, "bad_compression"),
        (zstandard.compress(bytes(BODY_BYTES + 1)), "zstd", 413, "too_large"),
        (gzip.compress(bytes(10**8)), "gzip", 413, "too_large"),
        (zstandard.compress(bytes(BODY_BYTES)), "zstd", 413, "expands_too_much"),
        (zstandard.compress(zstandard.compress(sinusoid(0))), "zstd", 422, "unreadable"),
    ],
)
@pytest.mark.parametrize("route", ["/v1/tasks", "/v1/adapt"])
def test_an_invalid_compressed_body_is_refused(
    daemon: Daemon, body: bytes, encoding: str, status: int, reason: str, route: str
) -> None:
    answer = daemon.client.post(route, content=body[: BODY_BYTES - 1], headers={"Content-Encoding": encoding})
    assert (answer.status_code, answer.json()["reason"]) == (status, reason)
    assert answer.headers.get("Accept-Encoding") == ("gzip, zstd" if status == 415 else None)
    if route == "/v1/tasks":
        assert f'rejected_total{{reason="{reason}",source="http"}}' in daemon.client.get("/metrics").text


def test_a_refused_task_is_kept_as_a_dead_letter(daemon: Daemon) -> None:
    folder = daemon.log.parent / "run/dead-letters"
    sent = {
        "../../letter": (sinusoid(0), 422, "bad_id", None),
        "letter-1": (b"no task", 422, "unreadable", None),
        "letter-2": (b"packed", 415, "unknown_encoding", "br"),
        "letter-3": (bytes(BODY_BYTES + 1), 413, "too_large", None),
        "letter-4": (zstandard.compress(bytes(BODY_BYTES + 1)), 413, "too_large", "zstd"),
        "sin-0": (sinusoid(99), 409, "conflict", None),
    }
    for id, (body, status, _, encoding) in sent.items():
        headers = {"Idempotency-Key": id} | ({"Content-Encoding": encoding} if encoding else {})
        assert daemon.client.post("/v1/tasks", content=body, headers=headers).status_code == status
    letters = list(read_letters(folder))[-len(sent) :]
    assert [(known["id"], known["reason"]) for _, known in letters] == [(id, sent[id][2]) for id in sent]
    for body, known in letters:
        assert known["source"] == "http"
        assert known["cut"] == (known["id"] == "letter-3"), "it was not read to its end"
        assert known["cut"] or body.read_bytes() == sent[known["id"]][0]
    daemon.client.post("/v1/adapt", content=b"nothing is kept of this one")
    assert len(list(read_letters(folder))) == len(list(folder.glob("*.body"))) == len(list(folder.iterdir())) // 2


def test_bytes_beyond_the_content_length_are_not_part_of_the_body(daemon: Daemon) -> None:
    body, url = sinusoid(710), httpx.URL(daemon.url)
    head = f"{POST}Idempotency-Key: longer\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((url.host, url.port), timeout=30) as connection:
        connection.sendall(head.encode() + body + b"\x00 and this is no request\r\n\r\n")
        said = b"".join(iter(lambda: connection.recv(65536), b""))
    answers = [line for line in said.split(b"\r\n") if line.startswith(b"HTTP/1.1")]
    assert {line[9:12] for line in answers} <= {b"201", b"400"}, "the rest counts as a second, invalid request"
    assert b"400" in {line[9:12] for line in answers}
    assert daemon.post(body, "longer").status_code in (200, 201), "the first request is a task, answered or not"


def test_a_client_that_sends_too_slowly_is_disconnected(daemon: Daemon) -> None:
    url = httpx.URL(daemon.url)
    with socket.create_connection((url.host, url.port), timeout=60) as connection:
        connection.sendall(f"{POST}Content-Length: 1000\r\n\r\nhalf".encode())
        said = b"".join(iter(lambda: connection.recv(65536), b""))
    assert said.startswith(b"HTTP/1.1 408")
    assert b"4 bytes of the body arrived within 4 s" in said
    assert daemon.post(sinusoid(711), "after-slow").status_code == 201


def test_endless_headers_are_refused(daemon: Daemon) -> None:
    url = httpx.URL(daemon.url)
    with socket.create_connection((url.host, url.port), timeout=60) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 66_000 + b"\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 431")


def test_a_body_at_the_limit_is_read(daemon: Daemon) -> None:
    assert daemon.post(bytes(BODY_BYTES)).status_code == 422


def test_a_client_that_hangs_up_does_not_harm_the_daemon(daemon: Daemon) -> None:
    url = httpx.URL(daemon.url)
    with socket.create_connection((url.host, url.port), timeout=5) as connection:
        connection.sendall(f"{POST}Content-Length: 1000\r\n\r\nhalf".encode())
    assert daemon.post(sinusoid(500), "after-hang-up").status_code == 201


def test_the_status_of_a_task(daemon: Daemon) -> None:
    with daemon.paused("trainer"):
        round = daemon.post(sinusoid(600), "fate").json()["round"]
        waiting = daemon.client.get("/v1/tasks/fate").json()
        assert waiting == {"status": "pending", "round": round, "loss_before": None, "loss_after": None}
    fate = wait_for(
        "the task is learned", lambda: (f := daemon.client.get("/v1/tasks/fate").json())["status"] != "pending" and f
    )
    line = json.loads((daemon.log.parent / "run/rounds.jsonl").read_text().splitlines()[round])
    assert line["id"] == "fate"
    losses = {key: line[key] for key in ("loss_before", "loss_after")}
    assert fate == {"status": "learned", "round": round, **losses}
    assert all(loss > 0 for loss in losses.values())


def test_the_status_of_an_unknown_task_is_404(daemon: Daemon) -> None:
    answer = daemon.client.get("/v1/tasks/never")
    assert (answer.status_code, answer.json()["reason"]) == (404, "unknown_task")
    assert "'never'" in answer.json()["detail"]


def test_the_first_task_is_round_0(daemon: Daemon) -> None:
    task = decode(sinusoid(0))
    assert task.support.x.shape == (5, 1)
    assert daemon.client.get("/v1/tasks/sin-0").json()["round"] == 0
