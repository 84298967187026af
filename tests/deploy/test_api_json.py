"""Tasks and requests in JSON over HTTP, and the examples that the daemon shows."""

import gzip
import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load, save

from deploy.server.app import make_curl_line
from streams.formats.json_body import make_example
from streams.history.history import History
from streams.ingest.dead_letters import read_letters
from streams.spec import TaskSpec
from tests.deploy.conftest import Cli
from tests.support.daemon import Daemon, decode, encode, sinusoid, wait_for

JSON = {"Content-Type": "application/json"}
TENSORS = "application/vnd.safetensors"


def as_lists(t: int, *names: str) -> dict[str, Any]:
    """Return the named tensors of a task of the stream as nested lists; all of them without names."""
    found = {name: tensor.tolist() for name, tensor in load(sinusoid(t)).items()}
    return {name: found[name] for name in names} if names else found


def post(daemon: Daemon, body: dict[str, Any] | bytes, path: str = "/v1/tasks", **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return daemon.client.post(path, content=content, headers=JSON | headers)


def test_a_task_in_json_is_stored_as_the_same_task_in_safetensors(daemon: Daemon) -> None:
    answer = post(daemon, as_lists(2000), **{"Idempotency-Key": "in-json"})
    other = daemon.post(sinusoid(2000), "in-safetensors")
    assert (answer.status_code, other.status_code) == (201, 201)
    with History.open(daemon.log.parent / "run/history", write=False) as history:
        assert history.payload(answer.json()["round"]) == history.payload(other.json()["round"]) == sinusoid(2000)


def test_the_default_id_is_the_hash_of_the_body_as_sent(daemon: Daemon) -> None:
    body = json.dumps(as_lists(2001)).encode()
    first = post(daemon, body)
    assert (first.status_code, first.json()["id"]) == (201, hashlib.sha256(body).hexdigest())
    assert (post(daemon, body).status_code, post(daemon, body).json()) == (200, first.json())
    packed = daemon.client.post("/v1/tasks", content=gzip.compress(body), headers=JSON | {"Content-Encoding": "gzip"})
    assert (packed.status_code, packed.json()) == (200, first.json())
    other = post(daemon, as_lists(2002), **{"Idempotency-Key": first.json()["id"]})
    assert (other.status_code, other.json()["reason"]) == (409, "conflict")


def test_a_query_is_optional_and_large_bodies_are_read_too(daemon: Daemon) -> None:
    support = as_lists(2003, "support_x", "support_y")
    assert post(daemon, support, **{"Idempotency-Key": "json-support"}).status_code == 201
    large = {name: values * 40 for name, values in as_lists(2004).items()}
    body = json.dumps(large).encode()
    assert len(body) > 8 * 1024
    assert post(daemon, body, **{"Idempotency-Key": "json-large"}).status_code == 201
    for id in ("json-support", "json-large"):
        wait_for("it is learned", lambda id=id: daemon.client.get(f"/v1/tasks/{id}").json()["status"] == "learned")


def test_a_wrong_body_is_refused_with_its_place_and_kept_as_sent(daemon: Daemon) -> None:
    wrong = json.dumps(as_lists(2005) | {"support_x": [[1], [2], ["a"], [4], [5]]}).encode()
    before = daemon.status()["rounds"]["ingested"]
    answer = post(daemon, wrong, **{"Idempotency-Key": "json-letter"})
    assert (answer.status_code, answer.json()["reason"]) == (422, "wrong_dtype")
    assert answer.json()["detail"] == "support_x[2][0] is a string ('a'); it must be a number"
    assert daemon.status()["rounds"]["ingested"] == before
    body, known = list(read_letters(daemon.log.parent / "run/dead-letters"))[-1]
    assert (known["id"], known["reason"], body.read_bytes()) == ("json-letter", "wrong_dtype", wrong)
    answer = post(daemon, wrong, "/v1/adapt")
    assert (answer.status_code, answer.json()["detail"][:15]) == (422, "support_x[2][0]")


def test_a_request_in_json_gets_the_predictions_of_one_in_safetensors(daemon: Daemon) -> None:
    daemon.wait_until_learned(daemon.status()["rounds"]["ingested"])
    names = ("support_x", "support_y", "query_x")
    task = decode(sinusoid(2006))
    tensors = encode({"support_x": task.support.x, "support_y": task.support.y, "query_x": task.query.x})
    expected = load(daemon.client.post("/v1/adapt", content=tensors).content)["predictions"]
    answer = post(daemon, as_lists(2006, *names), "/v1/adapt")
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "application/json")
    assert answer.json()["round"] == int(answer.headers["X-Online-Meta-Round"])
    assert torch.equal(torch.tensor(answer.json()["predictions"]), expected)


@pytest.mark.parametrize(
    ("accept", "from_json", "from_tensors"),
    [
        ("*/*", "application/json", TENSORS),
        ("application/json", "application/json", "application/json"),
        ("text/html, Application/JSON;q=0.9", "application/json", "application/json"),
        ("application/octet-stream", TENSORS, TENSORS),
        (f"application/json, {TENSORS}", "application/json", TENSORS),
    ],
)
def test_the_client_chooses_the_format_of_the_answer(
    daemon: Daemon, accept: str, from_json: str, from_tensors: str
) -> None:
    daemon.wait_until_learned(1)
    body = as_lists(2006, "support_x", "support_y", "query_x")
    tensors = save({name: torch.tensor(values) for name, values in body.items()})
    found = (
        post(daemon, body, "/v1/adapt", Accept=accept),
        daemon.client.post("/v1/adapt", content=tensors, headers={"Accept": accept}),
    )
    assert [answer.headers["Content-Type"] for answer in found] == [from_json, from_tensors]


def test_the_submit_command_sends_json_files(daemon: Daemon, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "json-file.json").write_text(json.dumps(as_lists(2007)))
    assert cli("submit", tmp_path / "json-file.json", "--url", daemon.url).code == 0
    assert daemon.client.get("/v1/tasks/json-file").status_code == 200


def curl_lines(daemon: Daemon) -> dict[str, str]:
    """Return the commands that the page of the API shows, by path."""
    paths = daemon.client.get("/openapi.json").json()["paths"]
    shown = {path: paths[path]["post"]["description"].split("```sh\n") for path in ("/v1/tasks", "/v1/adapt")}
    return {path: parts[1].split("\n```")[0] for path, parts in shown.items()}


def run(line: str, **environment: str) -> Any:
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def test_the_commands_of_the_api_page_work_as_printed(daemon: Daemon) -> None:
    lines = curl_lines(daemon)
    assert all("support_x" in line for line in lines.values())
    assert run(lines["/v1/tasks"], PATH="/usr/bin:/bin").keys() == {"id", "round"}
    assert torch.tensor(run(lines["/v1/adapt"], PATH="/usr/bin:/bin")["predictions"]).shape == (2, 1)


def test_the_api_page_has_examples_with_the_shapes_of_the_run(daemon: Daemon) -> None:
    paths, spec = daemon.client.get("/openapi.json").json()["paths"], TaskSpec(x_shape=(1,), y="real", y_shape=(1,))
    shown = paths["/v1/tasks"]["post"]["requestBody"]["content"]["application/json"]["example"]
    assert shown == make_example(spec) == daemon.client.get("/v1/examples/tasks").json()
    shown = paths["/v1/adapt"]["post"]["requestBody"]["content"]["application/json"]["example"]
    assert shown == make_example(spec, targets=False) == daemon.client.get("/v1/examples/adapt").json()


@pytest.mark.parametrize("token", [False, True])
def test_a_long_example_is_sent_from_where_the_daemon_serves_it(daemon: Daemon, token: bool) -> None:
    line = make_curl_line(daemon.url, "tasks", None, token)
    assert len(line) < 400
    assert line.count('"Authorization: Bearer $TOKEN"') == 2 * token
    assert run(line, PATH="/usr/bin:/bin", TOKEN="secret").keys() == {"id", "round"}
