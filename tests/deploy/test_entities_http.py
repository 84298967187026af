"""What the API says of an entity, and takes from it."""

import json
from urllib.parse import quote

import torch

from online_meta.types import Batch, Task
from streams.entities import make_entity_id
from streams.formats import wire
from tests.support.daemon import Daemon, decode, sinusoid


def send(daemon: Daemon, key: str, tasks: list[Task]) -> list[str]:
    """Submit tasks of an entity, and return their ids, once they are learned."""
    ids = [make_entity_id("shops", key, str(t)) for t in range(len(tasks))]
    for id, task in zip(ids, tasks, strict=True):
        answer = daemon.client.post("/v1/tasks", content=wire.encode(task), headers={"Idempotency-Key": id})
        assert answer.status_code == 201
    daemon.wait_until_learned(daemon.status()["rounds"]["ingested"])
    return ids


def test_an_entity_is_named_with_its_tasks_and_shows_their_losses(daemon: Daemon) -> None:
    key = "Café 7/b"
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
