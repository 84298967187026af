"""What the API says of an entity, and takes from it."""

import json
import math
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import torch

from deploy.config.config import read_config
from deploy.server.entities import _make_task
from deploy.server.entity_rows import prediction_to_json
from online_meta.outcomes import gaussian
from online_meta.prediction import mix, point
from online_meta.types import Batch, Task
from streams.entities import find_entity, make_entity_id
from streams.formats import wire
from streams.history.history import History
from streams.history.observations import assign_task, keep_rows, list_waiting
from streams.ingest.ingest import Ingest
from streams.spec import Limits
from streams.types import Receipt
from tests.docs.pages import code_of, read_page
from tests.support.daemon import Daemon, decode, sinusoid, wait_for, write_sinusoid


def send(daemon: Daemon, key: str, tasks: list[Task]) -> list[str]:
    """Submit tasks of an entity, and return their ids, once they are learned."""
    ids = [make_entity_id("shops", key, str(t)) for t in range(len(tasks))]
    for id, task in zip(ids, tasks, strict=True):
        answer = daemon.client.post("/v1/tasks", content=wire.encode(task), headers={"Idempotency-Key": id})
        assert answer.status_code == 201
    daemon.wait_until_learned(daemon.status()["rounds"]["ingested"])
    return ids


def test_an_entity_is_named_with_its_tasks_and_shows_their_losses(daemon: Daemon) -> None:
    key = "Café 8/b"
    first, second, other = (decode(sinusoid(t)) for t in (500, 501, 502))
    own_past = Task(Batch(*(torch.cat(each) for each in zip(*first, strict=True))), second.query)
    ids = send(daemon, key, [first, own_past])
    send(daemon, "another one", [other])
    assert daemon.client.get(f"/v1/tasks/{ids[0]}").json()["entity"] == key
    assert "entity" not in daemon.client.get("/v1/tasks/sin-0").json()
    lines = [json.loads(line) for line in (daemon.log.parent / "run/rounds.jsonl").read_text().splitlines()]
    own = [line for line in lines if line.get("entity") == key]
    assert [line["id"] for line in own] == ids
    found = daemon.client.get(f"/v1/entities/{quote(key, safe='')}").json()
    assert found["entity"] == key
    assert found["rows"] == 15, "the own past of the second task counts once"
    assert (found["total"], found["first_round"], found["last_round"]) == (2, own[0]["round"], own[1]["round"])
    for shown, line in zip(found["rounds"], own, strict=True):
        assert {name: shown[name] for name in ("id", "round", "loss_before", "loss_after")} == {
            name: line[name] for name in ("id", "round", "loss_before", "loss_after")
        }
        assert shown["status"] == "learned"
    short = daemon.client.get(f"/v1/entities/{quote(key)}", params={"points": 1}).json()
    assert [one["id"] for one in short["rounds"]] == ids[1:]


def test_an_unknown_entity_has_no_page(daemon: Daemon) -> None:
    answer = daemon.client.get("/v1/entities/nobody")
    assert (answer.status_code, answer.json()["reason"]) == (404, "unknown_entity")


def post(daemon: Daemon, path: str, rows: list[dict[str, Any]], **headers: str) -> httpx.Response:
    given = {"Content-Type": "application/json", **headers}
    return daemon.client.post(f"/v1/entities/{path}", content=json.dumps({"rows": rows}), headers=given)


def rows_of(t: int, n: int = 5) -> list[dict[str, Any]]:
    support = decode(sinusoid(t)).support
    return [{"x": x, "y": y} for x, y in zip(support.x.tolist(), support.y.tolist(), strict=True)][:n]


def adapted(daemon: Daemon, rows: list[dict[str, Any]], query: list[list[float]]) -> list[list[float]]:
    """Return what /v1/adapt answers to these rows as the support set."""
    body = {"support_x": [row["x"] for row in rows], "support_y": [row["y"] for row in rows], "query_x": query}
    answer = daemon.client.post("/v1/adapt", content=json.dumps(body), headers={"Content-Type": "application/json"})
    found: list[list[float]] = answer.json()["predictions"]
    return found


def test_observed_rows_are_known_at_once_and_become_tasks(daemon: Daemon) -> None:
    first, second = rows_of(700), rows_of(701)
    query = [[0.5], [-1.5]]
    unknown = post(daemon, "store%201/predict", [{"x": x} for x in query]).json()
    assert unknown["rows"] == 0
    answer = post(daemon, "store%201/observe", first, **{"Idempotency-Key": "one"})
    assert (answer.status_code, answer.json()["waiting"], answer.json()["task"]) == (201, 5, None)
    again = post(daemon, "store%201/observe", first, **{"Idempotency-Key": "one"})
    assert (again.status_code, again.json()["new"], again.json()["waiting"]) == (200, 0, 5)
    predicted = post(daemon, "store%201/predict", [{"x": x} for x in query]).json()
    assert predicted["rows"] == 5
    assert predicted["mean"] == pytest.approx(torch.tensor(adapted(daemon, first, query)), abs=1e-6)
    assert "outside" not in predicted
    far = post(daemon, "store%201/predict", [{"x": [0.0]}, {"x": [1e6]}]).json()
    assert far["outside"] == [False, True]
    assert "interval" not in predicted, "a squared error is no distribution"
    task = post(daemon, "store%201/observe", second).json()["task"]
    assert find_entity(task["id"]) == "store 1"
    third = rows_of(702) + rows_of(703)
    more = post(daemon, "store%201/observe", third).json()
    assert (more["waiting"], more["task"]["round"]) == (0, task["round"] + 1)
    daemon.wait_until_learned(daemon.status()["rounds"]["ingested"])
    shown = daemon.client.get("/v1/entities/store%201").json()
    assert (shown["rows"], shown["waiting"], shown["total"]) == (20, 0, 2)
    with History.open(daemon.log.parent / "run/history", write=False) as history:
        held_out, own_past = history[task["round"]], history[task["round"] + 1]
    known = torch.cat([held_out.support.x, held_out.query.x])
    assert sorted(known.tolist()) == sorted(row["x"] for row in first + second)
    assert torch.equal(own_past.support.x, known), "the next task of a known entity sees its past"
    assert own_past.query.x.tolist() == [row["x"] for row in third]


def label(daemon: Daemon, key: str, prediction: str, labels: Any) -> httpx.Response:
    body = json.dumps({"prediction": prediction, "labels": labels})
    headers = {"Content-Type": "application/json"}
    return daemon.client.post(f"/v1/entities/{key}/observe", content=body, headers=headers)


def test_a_stored_answer_of_the_present_leader_has_the_loss_of_the_round(daemon: Daemon) -> None:
    rows = rows_of(710)
    rounds = daemon.status()["rounds"]["ingested"]
    daemon.wait_until_learned(rounds)
    post(daemon, "late/observe", rows[:4])
    wanted = {"rows": [{"x": row["x"]} for row in rows_of(711)[:2]], "keep": True}

    def keep() -> dict[str, Any] | None:
        given = {"Content-Type": "application/json"}
        answer: dict[str, Any] = daemon.client.post(
            "/v1/entities/late/predict", content=json.dumps(wanted), headers=given
        ).json()
        return answer if answer["round"] == rounds else None

    kept = wait_for("the newest leader answers", keep)
    labels = [row["y"] for row in rows_of(711)[:2]]
    found = label(daemon, "late", kept["prediction"], labels)
    assert found.status_code == 201
    round = found.json()["task"]["round"]
    daemon.wait_until_learned(round + 1)
    line = json.loads((daemon.log.parent / "run/rounds.jsonl").read_text().splitlines()[round])
    assert line["stored_answer"] == {"loss": line["loss_after"], "leader": rounds}
    assert label(daemon, "late", kept["prediction"], labels).json() == {**found.json(), "new": 0}
    answers = [
        (label(daemon, "late", kept["prediction"], [[0.0], [0.0]]), 409, "conflict"),
        (label(daemon, "other", kept["prediction"], labels), 404, "unknown_prediction"),
        (label(daemon, "late", kept["prediction"], labels[:1]), 422, "wrong_shape"),
        (label(daemon, "late", kept["prediction"], None), 422, "unreadable"),
    ]
    for answer, status, reason in answers:
        assert (answer.status_code, answer.json()["reason"]) == (status, reason)


@pytest.mark.parametrize(
    ("path", "rows", "reason"),
    [
        ("observe", [{"x": [0.5]}], "missing_tensor"),
        ("observe", [{"x": [0.5, 1.0], "y": [1]}], "wrong_shape"),
        ("observe", [{"x": ["a"], "y": [1]}], "wrong_dtype"),
        ("observe", [], "unreadable"),
        ("predict", [{"x": [0.5], "y": [1]}], "missing_tensor"),
    ],
)
def test_wrong_rows_are_refused(daemon: Daemon, path: str, rows: list[dict[str, Any]], reason: str) -> None:
    answer = post(daemon, f"wrong/{path}", rows)
    assert (answer.status_code, answer.json()["reason"]) == (422, reason)
    assert daemon.client.get("/v1/entities/wrong").status_code == 404


def test_the_interval_of_a_prediction_has_the_level() -> None:
    mean = torch.tensor([[0.0], [1e6], [-3.0]], dtype=torch.float64)
    output = {"mean": mean, "scale": torch.full_like(mean, math.log(math.expm1(2.0)))}
    outcome = gaussian.build(least=1e-9)
    found = prediction_to_json(mix([point(outcome, output), point(outcome, output)], [0.0, 0.0]))
    assert found["mean"] == mean.tolist()
    assert found["interval"]["level"] == 0.9
    for name, side in (("low", -1), ("high", 1)):  # 1.6449 standard deviations of 2
        differences = (torch.tensor(found["interval"][name], dtype=torch.float64) - mean).ravel().tolist()
        assert differences == pytest.approx([side * 3.2897] * 3, abs=1e-3)


def test_rows_become_one_task_whatever_is_killed(tmp_path: Path) -> None:
    """A process ends after the rows were assigned to their task, and again after the task was committed."""
    config = read_config(write_sinusoid(tmp_path, '[[source]]\nkind = "http"\nmin_rows = 5\n'))
    with History.open(tmp_path / "history", write=True) as history:
        ingest = Ingest(history, config.task, Limits(), lambda: 0, lambda *_: None, lambda *_: None)
        state: Any = SimpleNamespace(config=config, history=history, ingest=ingest)
        keep_rows(history, "shop", "one", decode(sinusoid(1)).support, 5)
        id = make_entity_id("http", "shop", "o1-1")
        assign_task(history, list_waiting(history, "shop"), id)
        keep_rows(history, "shop", "two", decode(sinusoid(2)).support, 3)
        assert _make_task(state, "http", "shop") == Receipt(id, 0, duplicate=False)
        assert [one.rows for one in list_waiting(history, "shop")] == [3]
        with history.borrow_writer() as writer:  # the rows were not removed
            body = writer.execute("SELECT body FROM observations WHERE number = 2").fetchall()[0][0]
            writer.execute("UPDATE observations SET body = ? WHERE number = 1", (body,))
        assert _make_task(state, "http", "shop") == Receipt(id, 0, duplicate=False)
        assert len(history) == 1
        assert _make_task(state, "http", "shop") is None, "three rows wait on"
        ingest.close()


def test_the_commands_of_the_page_work_as_printed(daemon: Daemon) -> None:
    commands = code_of(read_page("how-to/entities.md"), "sh")
    answers = []
    for command in commands:
        words = shlex.split(command.replace("\\\n", " ").replace("http://127.0.0.1:8780", daemon.url))
        ended = subprocess.run([*words, "--fail-with-body", "--silent"], capture_output=True, check=False, text=True)
        assert ended.returncode == 0, ended.stdout
        answers.append(json.loads(ended.stdout))
    observed, predicted, shown = answers
    assert (observed["new"], predicted["rows"], shown["rows"]) == (2, 2, 2)
    assert len(predicted["mean"]) == 2
