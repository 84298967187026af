"""What is kept of a prediction: its outputs and what they mean, within bounds, until its labels make a round."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load

import online_meta.outcomes
from deploy.checks.preflight import open_sources
from deploy.config.config import read_config
from deploy.exits import ConfigError
from deploy.predictions import build_outcome, name_outcomes, name_prediction, restore_prediction
from deploy.server.entities import _take_labels
from deploy.server.entity_rows import StatisticsUnknown, decode_rows, prediction_to_json, save_tensors
from online_meta import registry
from online_meta.learners.hierarchical_bayes import LEAST
from online_meta.outcomes import categorical, cross_entropy, gaussian, outcome_of
from online_meta.prediction import loss_of, mix, point
from online_meta.types import Task
from streams.formats import wire
from streams.history.entity_rounds import find_rounds, read_rows
from streams.history.history import History
from streams.history.predictions import (
    DAY_SECONDS,
    Kept,
    PredictionsFull,
    Room,
    find_prediction,
    keep_prediction,
    note_labels,
    read_stored_answer,
)
from streams.ingest.ingest import Ingest
from streams.spec import Limits
from streams.tables import schema as tables
from streams.types import Arrival, Rejected
from tests.deploy.user_models import absolute_of_rows
from tests.support.daemon import decode, sinusoid, write_sinusoid
from trainers.settings import ModelSettings

OF_ROWS = "tests.deploy.user_models:absolute_of_rows"


@pytest.mark.parametrize("loss", [*registry.names(online_meta.outcomes), OF_ROWS])
def test_a_stored_answer_has_the_loss_of_the_answer(loss: str) -> None:
    if ":" in loss:
        outcome, (output, y) = outcome_of(absolute_of_rows), gaussian.example(5)
        output = output[:, :1]
    else:
        outcome = registry.load(online_meta.outcomes, loss)()
        output, y = registry.load_module(online_meta.outcomes, loss).example(5)
    several = mix([point(outcome, output), point(outcome, output)], [0.0, -1.0])
    model = ModelSettings("tests:none", loss=loss)
    for prediction in (point(outcome, output), several):
        outcomes = json.loads(json.dumps(name_outcomes(prediction, model)))
        restored = restore_prediction(load(save_tensors(name_prediction(prediction))), outcomes)
        assert loss_of(restored, y).tolist() == loss_of(prediction, y).tolist()


def test_each_component_keeps_its_own_outcome() -> None:
    mean, y = torch.tensor([[0.5], [1.0]]), torch.tensor([[1.0], [1.0]])
    noise = build_outcome("gaussian_of_noise", {"sigma": 0.3})
    own = point(gaussian.build(least=LEAST), {"mean": mean, "scale": mean})
    prediction = mix([point(noise, mean), own], [0.0, 0.0])
    outcomes = name_outcomes(
        prediction, ModelSettings("tests:none", loss="gaussian_of_noise", loss_options={"sigma": 0.3})
    )
    assert [one["loss"] for one in outcomes] == ["gaussian_of_noise", "gaussian"]
    restored = restore_prediction(name_prediction(prediction), outcomes)
    assert loss_of(restored, y).tolist() == loss_of(prediction, y).tolist()
    with pytest.raises(Rejected, match="an outcome of its own"):
        name_outcomes(point(categorical.build(), torch.zeros(2, 3)), ModelSettings("tests:none", loss="mse"))


def make_kept(number: int, size: int = 10) -> Kept:
    return Kept(f"http..shop..p{number}", "shop", 7, 1, 1, None, "[]", bytes(size))


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    with History.open(tmp_path / "history", write=True) as found:
        yield found


def test_kept_predictions_are_bounded_and_dropped_after_their_days(history: History) -> None:
    room = Room(predictions=2, bytes=100, days=3)
    assert find_prediction(history, "http..shop..p0", "shop") is None
    for number in range(2):
        keep_prediction(history, make_kept(number), room, now=1000.0 + number)
    with pytest.raises(PredictionsFull, match="2 predictions of 20 bytes wait for their labels, and at most 2"):
        keep_prediction(history, make_kept(2), room, now=1002.0)
    with pytest.raises(PredictionsFull, match="at most 9 of 100 bytes"):
        keep_prediction(history, make_kept(2, size=81), room._replace(predictions=9), now=1002.0)
    keep_prediction(history, make_kept(2), room, now=1000.5 + 3 * DAY_SECONDS)
    assert find_prediction(history, "http..shop..p0", "shop") is None
    assert find_prediction(history, "http..shop..p1", "other") is None
    found = find_prediction(history, "http..shop..p1", "shop")
    assert found == make_kept(1)


def test_labels_without_a_round_do_not_hold_and_those_of_a_round_do(tmp_path: Path, history: History) -> None:
    """The process ends after the labels were noted, before the task was committed."""
    config = read_config(write_sinusoid(tmp_path, '[[source]]\nkind = "http"\n'))
    ingest = Ingest(history, config.task, Limits(), lambda: 0, lambda *_: None, lambda *_: None)
    state: Any = SimpleNamespace(config=config, history=history, ingest=ingest, tables={}, observing=torch.no_grad())
    task = decode(sinusoid(1))
    prediction = point(build_outcome("mse", {}), torch.zeros(5, 1))
    tensors = {"support_x": task.support.x, "support_y": task.support.y, "query_x": task.query.x}
    body = save_tensors({**tensors, **name_prediction(prediction)})
    kept = make_kept(3)._replace(rows=5, seen=5, about=json.dumps([{"loss": "mse", "options": {}}]), body=body)
    keep_prediction(history, kept, Room(9, 10_000, 9), now=0.0)
    note_labels(history, kept.id, b"other labels", 3.0)
    labels = task.query.y.tolist()
    with pytest.raises(Rejected, match="labels has shape"):
        _take_labels(state, "shop", {"prediction": kept.id, "labels": [[[0.0]]] * 5})
    answer = _take_labels(state, "shop", {"prediction": kept.id, "labels": labels})
    said = json.loads(answer.body)
    assert (answer.status_code, said["new"], said["task"]) == (201, 5, {"id": kept.id, "round": 0})
    assert said["loss"] == pytest.approx(float((task.query.y**2).mean()))
    assert torch.equal(history[0].support.x, task.support.x)
    assert torch.equal(history[0].query.y, task.query.y)
    assert read_stored_answer(history, kept.id) == {"stored_answer": {"loss": said["loss"], "leader": 7}}
    assert read_stored_answer(history, "http..shop..other") == {}
    with history.borrow_writer() as writer:
        writer.execute("UPDATE predictions SET body = ?", (body,))  # as if the process had ended before it was removed
    again = _take_labels(state, "shop", {"prediction": kept.id, "labels": labels})
    assert (again.status_code, json.loads(again.body)) == (200, {**said, "new": 0})
    other = _take_labels(state, "shop", {"prediction": kept.id, "labels": [[0.0]] * 5})
    assert other.status_code == 409
    assert len(history) == 1
    after = find_prediction(history, kept.id, "shop")
    assert after is not None
    assert after.body is None
    waited = wire.encode(
        Task(decode(sinusoid(2)).support, task.support)
    )  # The rows that the prediction saw had waited.
    ingest.submit(Arrival("http..shop..o1-1", waited, "http", None), wait=False).result()
    rows = read_rows(history, find_rounds(history, "shop"))
    assert rows is not None
    assert len(rows.x) == 15, "rows that a prediction saw before they were in a task count once"
    ingest.close()


CLASSES = """
[[source]]
kind = "rows"
path = "none.csv"
x = ["price"]
y = "kind"
group_by = "store"
[source.columns.kind]
kind = "category"
size = 3
"""


def test_labels_have_their_names(tmp_path: Path) -> None:
    text = write_sinusoid(tmp_path, CLASSES).read_text()
    (tmp_path / "config.toml").write_text(
        text.replace('y = "real"\ny_shape = [1]', 'y = "class"\nways = 3').replace(
            'loss = "mse"', 'loss = "cross_entropy"'
        )
    )
    config = read_config(tmp_path / "config.toml")
    known = tables.begin(config.source[0].settings.make_schema(config.task))
    for kind in ("bread", "milk"):
        known = tables.update(known, {"kind": kind})
    table = SimpleNamespace(name="rows", schema=known.schema, statistics=None)
    state: Any = SimpleNamespace(config=config, tables={"rows": table})
    rows = [{"price": 2, "kind": "milk"}, {"price": 3, "kind": "bread"}]
    with pytest.raises(StatisticsUnknown):
        decode_rows(state, rows, targets=True)
    table.statistics = known
    decoded = decode_rows(state, rows, targets=True)
    assert (decoded.batch.y.tolist(), decoded.x.tolist()) == ([1, 0], [[2.0], [3.0]])
    assert decode_rows(state, [{"x": [2.0], "y": 2}], targets=True).table is None
    with pytest.raises(Rejected, match="column 'kind': 'cheese' is no known label; known: bread, milk"):
        decode_rows(state, [*rows, {"price": 3, "kind": "cheese"}], targets=True)
    logits = torch.tensor([[0.0, 2.0, 1.0], [0.0, 1.0, 2.0]])
    found = prediction_to_json(point(cross_entropy.build(), logits), known)
    assert found["labels"] == ["milk", 2], "a class without a name keeps its number"
    assert found["classes"] == ["bread", "milk", None]
    saved = json.loads(json.dumps(tables.write_state(tables.select_targets(known))))
    newer = tables.update(known, {"kind": "cheese"})
    given = tables.add_labels(tables.read_state(known.schema, saved), newer)
    assert np.array_equal(tables.encode_targets(given, [{"kind": "cheese"}, {"kind": "bread"}]), [2, 0])
    other = tables.update(tables.begin(known.schema), {"kind": "cheese"})
    assert tables.add_labels(given, other) == given, "another numbering adds no labels"


def test_rows_of_several_tables_need_a_name(tmp_path: Path) -> None:
    config = read_config(write_sinusoid(tmp_path, '[[source]]\nkind = "http"\n'))
    state: Any = SimpleNamespace(config=config, tables={"stores": None, "depots": None})
    with pytest.raises(
        Rejected, match=r'several sources have columns \(stores, depots\): name one .* table = "stores"'
    ):
        decode_rows(state, [{"price": 1}], targets=False)
    assert decode_rows(state, [{"x": [1.0]}], targets=False).table is None
    other = read_config(write_sinusoid(tmp_path, '[[source]]\nkind = "http"\ntable = "stores"\n'))
    with pytest.raises(
        ConfigError, match=r"\[\[source\]\] http: table = 'stores' is no source with columns: there is none"
    ):
        open_sources(other)
