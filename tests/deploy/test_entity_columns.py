"""Rows of entities by the names of a table's columns, and predictions that are kept until their labels come."""

import json
import math
import random
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from deploy.erasure import find_remains
from online_meta.types import Task
from streams.client import Client, DaemonError
from streams.entities import find_entity
from streams.history.history import History
from tests.deploy.conftest import Cli
from tests.support.daemon import SECTIONS, Daemon, free_port, running_daemon, wait_for
from tests.support.finished import lines

ROWS = 40
CONFIG = """
[run]
path = "{folder}/run"
[task]
x_shape = [4]
y = "real"
y_shape = [1]
[model]
build = "trainers.models:mlp"
args = {{ inputs = 4, outputs = 1, hidden = [8] }}
loss = "gaussian_of_noise"
{sections}
[serve]
port = {port}
answers = "ftml"
limits = {{ kept_predictions = 3 }}
[[source]]
kind = "rows"
path = "{folder}/sales.csv"
x = ["price", "colour"]
y = "sales"
group_by = "store"
max_rows = 10
support = "own past"
[source.columns.price]
kind = "number"
[source.columns.colour]
kind = "category"
values = ["red", "blue"]
[source.columns.sales]
kind = "number"
scale = "standard"
[[source]]
kind = "http"
min_rows = 4
"""


def make_sales() -> list[dict[str, Any]]:
    draw = random.Random(3)
    return [
        {
            "store": f"shop {at % 2}",
            "price": round(draw.uniform(1, 3), 2),
            "colour": draw.choice(["red", "blue"]),
            "sales": round(draw.uniform(100, 500)),
        }
        for at in range(ROWS)
    ]


SALES = make_sales()
PRICES, SOLD = (np.array([row[name] for row in SALES], np.float64) for name in ("price", "sales"))
NEW = [{"price": 1.5, "colour": "blue"}, {"price": 2.75, "colour": "green"}]


def encode(row: dict[str, Any]) -> list[float]:
    """Return the numbers of a row by the statistics of the whole file, computed at once."""
    colour = ["red", "blue"].index(row["colour"]) + 1 if row["colour"] in ("red", "blue") else 0
    return [(row["price"] - PRICES.mean()) / PRICES.std(), *(float(at == colour) for at in range(3))]


class Running:
    """The daemon of these tests, which can be killed."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.run, self._stack = folder / "run", stack
        self._config = folder / "config.toml"
        self._config.write_text(CONFIG.format(folder=folder, sections=SECTIONS, port=free_port()))
        self.start()

    def start(self) -> None:
        self.daemon: Daemon = self._stack.enter_context(running_daemon(self._config))

    def kill(self) -> None:
        children = [child.pid for child in psutil.Process(self.daemon.process.pid).children(recursive=True)]
        self.daemon.process.send_signal(signal.SIGKILL)
        self.daemon.process.wait()
        wait_for("the children end", lambda: not any(map(psutil.pid_exists, children)))

    def wait_until_learned(self) -> int:
        rounds: int = self.daemon.status()["rounds"]["ingested"]
        self.daemon.wait_until_learned(rounds)
        return rounds

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        headers = {"Content-Type": "application/json"}
        return self.daemon.client.post(f"/v1/entities/{path}", content=json.dumps(body), headers=headers)

    def predict_from_newest(self, key: str, **more: Any) -> dict[str, Any]:
        """Return a prediction for ``NEW`` by the leader that has learned all rounds."""
        rounds = self.wait_until_learned()
        wait_for("the newest leader answers", lambda: self.predict(key)["round"] == rounds)
        return self.predict(key, **more)

    def predict(self, key: str, **more: Any) -> dict[str, Any]:
        found: dict[str, Any] = self.post(f"{key}/predict", {"rows": NEW, **more}).json()
        return found

    def task(self, round: int) -> Task:
        with History.open(self.run / "history", write=False) as history:
            return history[round]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("columns")
    text = "\n".join([",".join(SALES[0]), *(",".join(map(str, row.values())) for row in SALES)])
    (folder / "sales.csv").write_text(text + "\n")
    with ExitStack() as stack:
        found = Running(folder, stack)
        found.daemon.wait_until_learned(4)
        yield found


def test_rows_are_read_and_answered_in_the_terms_of_the_columns(running: Running) -> None:
    answer = running.predict_from_newest("shop%200")
    with History.open(running.run / "history", write=False) as history:
        known = [(x, y) for round in (0, 2) for part in history[round] for x, y in zip(part.x, part.y, strict=True)]
    known = known[:10] + known[20:] if len(known) > 20 else known  # The support of the second is the first.
    assert answer["rows"] == len(known) == 20
    body = {
        "support_x": [x.tolist() for x, _ in known],
        "support_y": [y.tolist() for _, y in known],
        "query_x": [encode(row) for row in NEW],
    }
    plain = running.daemon.client.post(
        "/v1/adapt", content=json.dumps(body), headers={"Content-Type": "application/json"}
    ).json()
    assert plain["round"] == answer["round"]
    want = SOLD.mean() + np.array(plain["predictions"]) * SOLD.std()
    assert np.allclose(answer["mean"], want, rtol=1e-4)
    half = 1.6448536 * SOLD.std()
    assert np.allclose(answer["interval"]["low"], want - half, rtol=1e-4)
    assert np.allclose(answer["interval"]["high"], want + half, rtol=1e-4)
    numbers = running.post("shop%200/predict", {"rows": [{"x": encode(row)} for row in NEW]}).json()
    assert np.allclose(numbers["mean"], plain["predictions"], atol=1e-4), "rows of x stay in the model's units"


def test_observed_rows_change_no_statistics(running: Running) -> None:
    rows = [{"price": 900.0, "colour": "red", "sales": 1e6, "comment": "ignored"}, {**NEW[0], "sales": 250}]
    for _ in range(2):  # The second request comes after rows that would move every mean.
        answer = running.post("new/observe", {"rows": rows})
        assert answer.status_code == 201, answer.text
        rows = [{**row, "sales": row["sales"] + 1} for row in rows]
    task = running.task(answer.json()["task"]["round"])
    x = np.concatenate([part.x.numpy() for part in task])
    y = np.concatenate([part.y.numpy() for part in task]).ravel()
    assert sorted(x[:, 0].tolist()) == pytest.approx([encode(NEW[0])[0]] * 2 + [10.0] * 2, abs=1e-5)
    want = [(sold - SOLD.mean()) / SOLD.std() for sold in (250, 251)] + [10.0] * 2
    assert sorted(y.tolist()) == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize(
    ("path", "row", "status", "said"),
    [
        (
            "observe",
            {"price": 1.0, "colour": "red"},
            422,
            "the row at 1 has no column 'sales'; it has 'price', 'colour'",
        ),
        (
            "observe",
            {**NEW[0], "sales": None},
            422,
            "the row at 1, column 'sales': it is missing: a target must be known",
        ),
        (
            "predict",
            {"prize": 1.0, "colour": "red"},
            422,
            "no column 'price'; it has 'prize', 'colour' and needs 'price'",
        ),
        ("predict", {"price": "cheap", "colour": "red"}, 422, "the row at 1, column 'price': 'cheap' is not a number"),
    ],
)
def test_wrong_columns_are_named(running: Running, path: str, row: dict[str, Any], status: int, said: str) -> None:
    first = {**NEW[0], "sales": 3}
    answer = running.post(f"wrong/{path}", {"rows": [first, row]})
    assert answer.status_code == status
    assert said in answer.json()["detail"]
    assert running.daemon.client.get("/v1/entities/wrong").status_code == 404


def test_labels_that_come_later_are_scored_by_the_stored_answer(running: Running, cli: Cli) -> None:
    kept = running.predict_from_newest("shop%201", keep=True)
    id = kept["prediction"]
    assert find_entity(id) == "shop 1"
    for t in range(3):  # The leader learns more rounds, and more is known of the entity, before the labels come.
        rows = [{**row, "sales": 100 + 7 * t + at} for at, row in enumerate([*NEW, *NEW])]
        assert running.post("shop%201/observe", {"rows": rows}).json()["task"] is not None
    running.wait_until_learned()
    before = running.daemon.client.get("/v1/entities/shop%201").json()
    assert (before["rows"], before["kept"]) == (32, 1)
    running.kill()
    running.start()
    with Client(running.daemon.url, retry_seconds=30) as client:
        wrong = [
            (f"{id}0", [1, 2], 404, "is kept"),
            (id, [1], 422, "2 rows, and there are 1 labels"),
            (id, [1, "a"], 422, "the row at 1, column 'sales': 'a' is not a number"),
        ]
        for other, labels, status, said in wrong:
            with pytest.raises(DaemonError, match=said) as refused:
                client.label(other, labels)
            assert refused.value.status == status
        found = client.label(id, [300, 410])
        assert client.label(id, [300, 410]) == {**found, "new": 0}, "the same labels count once"
        with pytest.raises(DaemonError, match="has other labels already") as refused:
            client.label(id, [300, 411])
        assert refused.value.status == 409
    means = (np.array(kept["mean"]).ravel() - SOLD.mean()) / SOLD.std()
    targets = (np.array([300, 410]) - SOLD.mean()) / SOLD.std()
    loss = float(np.mean((targets - means) ** 2 / 2 + math.log(2 * math.pi) / 2))
    assert found["loss"] == pytest.approx(loss, rel=1e-4)
    assert (found["new"], found["task"]["id"]) == (2, id)
    round = running.wait_until_learned() - 1
    assert found["task"]["round"] == round
    line = lines(running.run / "rounds.jsonl")[round]
    assert (line["id"], line["entity"]) == (id, "shop 1")
    assert line["stored_answer"] == {"loss": found["loss"], "leader": kept["round"]}
    assert line["loss_after"] != pytest.approx(found["loss"], abs=1e-4), "the present leader answers otherwise"
    task = running.task(round)
    assert task.support.y.shape == (20, 1), "the support set is what the prediction saw"
    assert task.query.y.ravel().tolist() == pytest.approx(targets.tolist(), abs=1e-5)
    assert np.allclose(task.query.x, [encode(row) for row in NEW], atol=1e-5)
    after = running.daemon.client.get("/v1/entities/shop%201").json()
    assert (after["rows"], after["kept"], after["rounds"][-1]["stored_answer"]) == (34, 0, line["stored_answer"])
    assert running.daemon.client.get(f"/v1/tasks/{id}").json()["stored_answer"]["leader"] == kept["round"]
    assert running.post("nobody/predict", {"rows": NEW[:1], "keep": True}).json()["reason"] == "empty_support"
    ids = [running.predict("shop%200", keep=True)["prediction"] for _ in range(2)]
    ids.append(running.predict("nobody", keep=True)["prediction"])
    full = running.post("shop%200/predict", {"rows": NEW, "keep": True})
    assert (full.status_code, full.json()["reason"]) == (507, "predictions_full")
    first = running.post("nobody/observe", {"prediction": ids[2], "labels": [200, 300]}).json()
    running.daemon.wait_until_learned(first["task"]["round"] + 1)
    assert running.daemon.client.get("/v1/entities/nobody").json()["rows"] == 2, "part of them is held out"
    assert running.daemon.drain() == 0
    assert "Traceback" not in running.daemon.log.read_text()
    assert cli("forget", running.run, "shop 0").code == 0
    assert find_remains(running.run, "shop 0") == []
    with History.open(running.run / "history", write=False) as history:
        entities = [key for (key,) in history.query("SELECT entity FROM predictions ORDER BY made")]
    assert entities == ["shop 1", "nobody"]
