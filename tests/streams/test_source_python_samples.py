"""Samples of an iterator that are cut into tasks like the rows of a file."""

import json
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deploy.checks.preflight import open_sources
from deploy.config.config import make_config
from online_meta.types import Batch, Task
from streams.formats import wire
from streams.history.history import History
from streams.sources import python, samples
from streams.spec import Limits, TaskSpec
from streams.types import Arrival, Rejected
from tests.support import feeds
from tests.support.ingesting import Open, until

HERE = "tests.support.feeds"
REAL = TaskSpec(x_shape=(2,), y="real", y_shape=(1,))
LABELS = TaskSpec(x_shape=(2,), ways=3)
RUN_LENGTH = {"change": "run_length", "change_options": {"hypotheses": 10}}
WAYS = [RUN_LENGTH, {"change": "loss_jump", "change_options": {"jump": 3.0}, "most": 40}, {"count": 9}]
every_way = pytest.mark.parametrize("options", WAYS, ids=["run_length", "loss_jump", "count"])
every_spec = pytest.mark.parametrize("spec", [REAL, LABELS], ids=["real", "labels"])


def opened(function: str, spec: TaskSpec, args: dict[str, Any] | None = None, **options: Any) -> Any:
    return python.create_source(python.Settings(f"{HERE}:{function}", args or {}, **options), spec, "mine", 0)


def tasks(function: str, spec: TaskSpec, after: str | None = None, **options: Any) -> list[Arrival]:
    """Return all arrivals until the stream has been idle ten times in a row."""
    stream, found, idle = opened(function, spec, **options).read(after), [], 0
    while idle < 10:
        item = next(stream)
        idle = 0 if item else idle + 1
        found += [item] if item else []
    return found


@every_way
@every_spec
def test_samples_are_cut_like_the_rows_of_a_file(tmp_path: Path, options: dict[str, Any], spec: TaskSpec) -> None:
    args = {"labels": spec is LABELS}
    drawn = [pair for pair in feeds.pairs(**args) if pair is not None]
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"x": x.tolist(), "y": y.tolist()}) + "\n" for x, y in drawn]
    path.write_text("".join(lines))
    settings = samples.Settings(str(path), ("x",), ("y",), grows=False, **options)
    rows = list(iter(partial(next, samples.create_source(settings, spec, "rows", 0).read(None)), None))
    found = tasks("pairs", spec, args=args, **options)
    assert [arrival.body for arrival in found] == [arrival.body for arrival in rows]
    bytes_to = [0, *np.cumsum([len(line) for line in lines]).tolist()]
    ends = [bytes_to.index(int(arrival.cursor or 0)) for arrival in rows]
    assert [arrival.cursor for arrival in found] == [str(end) for end in ends]
    assert [arrival.id for arrival in found] == [f"mine-{begin}" for begin in [0, *ends[:-1]]]
    if options is RUN_LENGTH:
        assert ends == pytest.approx([30, 52, 93, 128], abs=5), "the rest at the end of the iterator is a task"


@every_way
@pytest.mark.parametrize("function", ["pairs", "pairs_behind"])
def test_the_same_tasks_come_from_any_position(options: dict[str, Any], function: str) -> None:
    whole = tasks(function, REAL, **options)
    assert len(whole) >= 3
    for at, arrival in enumerate(whole):
        assert tasks(function, REAL, arrival.cursor, **options) == whole[at + 1 :]
    assert tasks(function, REAL, "999", **options) == []


def test_a_function_with_after_starts_after_that_many_samples() -> None:
    feeds.calls.clear()
    first = tasks("pairs_behind", REAL, **RUN_LENGTH)[0]
    tasks("pairs_behind", REAL, first.cursor, **RUN_LENGTH)
    assert feeds.calls == [0, int(first.cursor or 0)]
    assert feeds.calls[1] > 20


def test_none_means_no_sample_yet_and_shifts_no_cut() -> None:
    stream = opened("pairs", REAL, count=9).read(None)
    came = [next(stream) for _ in range(5)]
    assert [item and item.id for item in came] == [None, "mine-0", None, None, "mine-9"], "at samples 3, 10 and 17"
    with_none, without = (tasks(function, REAL, **RUN_LENGTH) for function in ("pairs", "pairs_behind"))
    assert with_none == without


@pytest.mark.parametrize(
    ("other", "reason", "detail"),
    [
        ((torch.zeros(1, 2), torch.tensor(1)), "wrong_shape", "the row at 10 has x of shape (1, 2); it must be (2,)"),
        ((torch.zeros(2), torch.tensor([1])), "wrong_shape", "has y of shape (1,); it must be ()"),
        ((torch.zeros(2), torch.tensor(1.5)), "wrong_dtype", "the row at 10 has no valid int64 for y"),
        ((["a", "b"], 1), "wrong_dtype", "has no valid float32 for x"),
        (([[1.0], [2.0, 3.0]], 1), "unreadable", "the row at 10 cannot be read"),
        ((torch.tensor([1.0, float("nan")]), torch.tensor(1)), "not_finite", "NaN"),
        ((torch.zeros(2), torch.tensor(3)), "label_out_of_range", "labels run from 0 to 2"),
    ],
)
def test_an_invalid_sample_refuses_its_task_and_shifts_no_cut(other: Any, reason: str, detail: str) -> None:
    plain = tasks("pairs", LABELS, args={"labels": True}, **RUN_LENGTH)
    found = tasks("pairs_with", LABELS, args={"others": {"10": other}}, **RUN_LENGTH)
    assert [arrival.cursor for arrival in found] == [arrival.cursor for arrival in plain]
    assert [arrival.body for arrival in found[1:]] == [arrival.body for arrival in plain[1:]]
    rejection = found[0].rejection
    if rejection is None:  # as with a file, values are checked when the task is ingested
        with pytest.raises(Rejected) as raised:
            wire.decode(found[0].body, LABELS, Limits())
        rejection = raised.value
    else:
        lines = [json.loads(line) for line in found[0].body.splitlines()]
        assert len(lines) == int(found[0].cursor or 0), "a dead letter has the samples"
        assert lines[0].keys() == {"x", "y"}
        assert len(lines[0]["x"]) == 2
        assert lines[10].keys() == ({"fault"} if reason == "unreadable" else {"x", "y"})
    assert rejection.reason == reason
    assert detail in rejection.detail


@pytest.mark.parametrize(
    "kind",
    [
        lambda x, y: (x.double(), y.to(torch.int32)),
        lambda x, y: (x.bfloat16(), y),
        lambda x, y: (x.numpy(), y.numpy()),
        lambda x, y: (tuple(x.tolist()), int(y)),
        lambda x, y: (x.clone().requires_grad_(), y),
    ],
    ids=["float64", "bfloat16", "numpy", "numbers", "grad"],
)
def test_tensors_arrays_and_numbers_are_samples(kind: Any) -> None:
    x, y = torch.tensor([0.5, -1.25]), torch.tensor(2)
    others = {str(at): kind(x, y) for at in range(2)}
    task = wire.decode(tasks("pairs_with", LABELS, args={"others": others}, count=2)[0].body, LABELS, Limits())
    assert torch.equal(task.support.x, x[None])
    assert torch.equal(task.query.y, y[None])


def test_an_iterator_may_reuse_its_buffer() -> None:
    first = wire.decode(tasks("one_buffer", REAL, count=6)[0].body, REAL, Limits())
    assert torch.cat([first.support.x, first.query.x]).sum(1).sort().values.tolist() == [0, 2, 4, 6, 8, 10]


def test_samples_of_many_sizes_are_cut_by_count() -> None:
    spec = TaskSpec(x_shape=(-1,), ways=3)
    others = {"2": (torch.zeros(5), 0), "3": (torch.ones(5), 1), "5": (torch.ones(4), 1)}
    first, second, third = tasks("pairs_with", spec, args={"others": others}, count=2)[:3]
    assert [wire.decode(one.body, spec, Limits()).support.x.shape for one in (first, second)] == [(1, 2), (1, 5)]
    assert third.rejection is not None
    assert third.rejection.reason == "wrong_shape"


@pytest.mark.parametrize(
    ("function", "args", "options", "message"),
    [
        ("plain", {}, RUN_LENGTH, "the iterator yielded Task; with count or change"),
        ("named", {}, {"count": 3}, "For whole tasks, omit count and change"),
        ("pairs_with", {"others": {"3": [1.0, 2.0]}}, {"count": 9}, "the iterator yielded list"),
        ("pairs", {}, {}, "to cut samples (x, y), set count or change"),
    ],
)
def test_tasks_and_samples_cannot_be_mixed(
    function: str, args: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError) as raised:
        tasks(function, REAL, args=args, **options)
    assert message in str(raised.value)


def test_a_task_inside_a_pair_is_refused() -> None:
    batch = Batch(torch.zeros(2, 2), torch.zeros(2, 1))
    with pytest.raises(TypeError, match="the iterator yielded tuple"):
        tasks("pairs_with", REAL, args={"others": {"0": ("id", Task(batch, batch))}}, count=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 3, "change": "run_length"}, "set count"),
        ({"change": "run_lenght"}, "did you mean 'run_length'"),
        ({"change": "run_length", "change_options": {"hazrd": 0.1}}, "did you mean 'hazard'"),
        ({"change": "run_length", "likelihood": "gaussian_classes"}, "is not for y = 'real'"),
    ],
)
def test_wrong_cutting_options_are_reported_when_the_source_is_opened(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opened("pairs", REAL, **options)


def test_a_position_is_a_number() -> None:
    with pytest.raises(ValueError, match="the position 'x'"):
        tasks("pairs", REAL, "x", **RUN_LENGTH)


def test_the_configuration_enables_cutting() -> None:
    run = {"run": {"path": "x"}, "task": {"x_shape": [2], "y": "class", "ways": 3}}
    run["model"] = {"build": "trainers.models:mlp", "args": {"inputs": 2, "outputs": 3}}
    source = {"kind": "python", "iterator": f"{HERE}:pairs", "args": {"labels": True}}
    config = make_config({**run, "source": [{**source, **RUN_LENGTH, "likelihood_options": {"shape": 2.0}}]}, "here")
    stream = open_sources(config)["python"].read(None)
    found = [item for item in (next(stream) for _ in range(200)) if item]
    assert len(found) == 4


def test_samples_become_rounds_once_across_restarts(open_ingest: Open, faulty: History) -> None:
    expected = tasks("pairs", LABELS, args={"labels": True}, **RUN_LENGTH)
    for count, lengths in ((1, (30, 22)), (2, (30, 22, 41)), (4, (30, 22, 41, 35))):
        source = opened("pairs", LABELS, {"labels": True, "lengths": lengths}, **RUN_LENGTH)
        ingest = open_ingest()
        ingest.pull("mine", source._replace(keep_rest=count == 4))  # the first two end early; more samples follow
        until(lambda count=count: len(faulty) >= count)
        ingest.close()
    assert [faulty.entry(n).id for n in range(len(faulty))] == [arrival.id for arrival in expected]
    sizes = [len(faulty[n].support.x) + len(faulty[n].query.x) for n in range(len(faulty))]
    ends = [0, *(int(arrival.cursor or 0) for arrival in expected)]
    assert sizes == [end - begin for begin, end in pairwise(ends)]
