"""A source refuses tasks with far too large numbers, by a bound that only earlier committed tasks decide."""

import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch

from deploy.config.config import make_config
from deploy.config.messages import format_value
from deploy.exits import ConfigError
from online_meta.types import Batch, Task
from streams.formats import wire
from streams.history.errors import HistoryFull
from streams.history.history import History
from streams.ingest import group_commit
from streams.ingest.dead_letters import DeadLetters, read_letters
from streams.ingest.ingest import Ingest
from streams.ingest.outliers import MINIMUM, WINDOW, compute_bound, measure_scales
from streams.spec import Limits, TaskSpec
from streams.types import Arrival, Receipt, Rejected, Scales
from tests.support.ingesting import Faulty, until

REAL = TaskSpec(x_shape=(2,), y="real", y_shape=(1,))
LABELS = TaskSpec(x_shape=(2,), ways=3)


def make_task(seed: int, scale: float = 1.0, inputs: float = 1.0, spec: TaskSpec = REAL) -> Task:
    random = torch.Generator().manual_seed(seed)

    def batch(n: int) -> Batch:
        x = inputs * torch.randn(n, 2, generator=random)
        labels = torch.randint(3, (n,), generator=random)
        return Batch(x, labels if spec.ways else scale * torch.randn(n, 1, generator=random))

    return Task(batch(6), batch(4))


def arrival(task: Task, id: str, source: str = "queue", cursor: str | None = None) -> Arrival:
    return Arrival(id, wire.encode(task), source, cursor)


Open = Callable[..., Ingest]


@pytest.fixture
def open_ingest(faulty: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    monkeypatch.setattr(group_commit, "PAUSE_SECONDS", 0.02)
    opened: list[Ingest] = []

    def make(spec: TaskSpec = REAL, outliers: tuple[str, ...] = ("queue",)) -> Ingest:
        opened.append(
            Ingest(
                *(faulty, spec, Limits(backlog=10_000), lambda: 0, lambda *said: None, lambda *said: None),
                dead_letters=DeadLetters(tmp_path / "letters", 100, 1 << 20),
                outlier_sources=outliers,
            )
        )
        return opened[-1]

    yield make
    faulty.fault = None
    if faulty.gate is not None:
        faulty.gate.set()
    for one in opened:
        one.close()


def submit(ingest: Ingest, task: Task, id: str, source: str = "queue") -> str:
    """Return "new", "duplicate" or the reason of a refusal."""
    try:
        answer = ingest.submit(arrival(task, id, source), wait=False).result(60)
    except Rejected as rejection:
        return rejection.reason
    assert isinstance(answer, Receipt)
    return "duplicate" if answer.duplicate else "new"


def bring(ingest: Ingest, numbers: range, **options: Any) -> list[str]:
    return [submit(ingest, make_task(n, **options), f"task-{n}") for n in numbers]


@pytest.mark.parametrize(
    "spoiled",
    [
        {"scale": 1e6},
        {"scale": 1e20},
        {"inputs": 1e4},
        {"scale": 1e38},
        {"scale": 400.0},
    ],
    ids=str,
)
def test_a_task_with_far_too_large_numbers_is_refused(
    open_ingest: Open, faulty: Faulty, tmp_path: Path, spoiled: dict[str, float]
) -> None:
    ingest = open_ingest()
    assert bring(ingest, range(40)) == ["new"] * 40
    assert submit(ingest, make_task(99, **spoiled), "bad") == "outlier"
    assert bring(ingest, range(40, 45)) == ["new"] * 5
    assert len(faulty) == 45
    ((body, letter),) = read_letters(tmp_path / "letters")
    assert (letter["reason"], letter["id"]) == ("outlier", "bad")
    evidence = letter["evidence"]
    assert evidence["part"] == ("inputs" if "inputs" in spoiled else "targets")
    assert evidence["scale"] > evidence["largest"] > evidence["median"]
    assert evidence["tasks"] == 40
    assert f"{evidence['largest']:.4g}" in letter["detail"]
    assert body.read_bytes() == wire.encode(make_task(99, **spoiled))


def test_a_unix_time_as_target_is_refused(open_ingest: Open) -> None:
    ingest = open_ingest()
    bring(ingest, range(30))
    task = make_task(50)
    times = Task(task.support, Batch(task.query.x, 1.7e9 + task.query.y))
    assert submit(ingest, times, "times") == "outlier"


def test_the_bound_is_that_of_the_formula() -> None:
    random = np.random.default_rng(0)
    scales = np.exp(random.normal(1.0, 0.7, 101)).tolist()
    logarithms = [math.log(scale) for scale in scales]
    middle = median(logarithms)
    spread = median(abs(one - middle) for one in logarithms)
    bound = compute_bound(scales)
    assert bound is not None
    assert bound.largest == pytest.approx(math.exp(middle + 6 * 1.4826 * spread), rel=1e-12)
    assert bound.median == pytest.approx(median(scales), rel=1e-12)
    equal = compute_bound([3.0] * MINIMUM)
    assert equal is not None
    assert equal.largest == pytest.approx(30.0, rel=1e-12), "ten times the median where all tasks are alike"
    assert compute_bound([3.0] * (MINIMUM - 1)) is None
    spoiled = compute_bound([3.0] * 60 + [1e9] * 40)
    assert spoiled is not None
    assert spoiled.largest == pytest.approx(30.0), "less than half of the tasks cannot move the bound"
    assert math.isfinite(compute_bound([1e-300] * 20 + [1e300] * 20).largest)  # type: ignore[union-attr]


def test_scales_are_root_mean_squares_of_support_and_query() -> None:
    x, y = torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0]])
    task = Task(Batch(x, y), Batch(0 * x, -y))
    assert measure_scales(task) == Scales(pytest.approx(2.5), pytest.approx(2.0))
    assert measure_scales(Task(Batch(x, 0 * y), Batch(x, 0 * y))).y is None
    huge = torch.full((1, 2), 1e300, dtype=torch.float64)
    assert measure_scales(Task(Batch(huge, y), Batch(huge, y))).x == pytest.approx(1e300)
    labels = torch.tensor([2])
    pixels = torch.full((1, 2), 255, dtype=torch.uint8)
    assert measure_scales(Task(Batch(pixels, labels), Batch(pixels, labels))) == Scales(None, None)


@pytest.mark.parametrize("mean", [-2.0, 0.0, 3.0])
@pytest.mark.parametrize("spread", [0.0, 0.5, 1.0])
def test_tasks_that_differ_in_scale_are_no_outliers(open_ingest: Open, mean: float, spread: float) -> None:
    random = np.random.default_rng(1)
    scales = np.exp(random.normal(mean, spread, 200))
    ingest = open_ingest()
    found = [submit(ingest, make_task(n, scale=scale), f"task-{n}") for n, scale in enumerate(scales)]
    assert found == ["new"] * 200


def test_the_first_tasks_and_other_sources_are_accepted(open_ingest: Open) -> None:
    ingest = open_ingest()
    assert submit(ingest, make_task(0, scale=1e6), "first") == "new"
    assert bring(ingest, range(1, 40)) == ["new"] * 39
    assert submit(ingest, make_task(50, scale=1e6), "other", source="http") == "new"
    assert submit(ingest, make_task(51, scale=1e6), "late") == "outlier"


def test_labels_have_no_scale_and_inputs_have(open_ingest: Open) -> None:
    ingest = open_ingest(LABELS)
    assert bring(ingest, range(40), spec=LABELS) == ["new"] * 40
    assert submit(ingest, make_task(99, inputs=1e3, spec=LABELS), "bad") == "outlier"


def decisions(ingest: Ingest, first: int, tasks: list[Task]) -> list[str]:
    return [submit(ingest, task, f"drift-{first + n}") for n, task in enumerate(tasks)]


def test_a_restart_at_any_moment_changes_no_decision(
    tmp_path: Path, open_ingest: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales drift, and some tasks are near the bound; a history with restarts decides like one without."""
    monkeypatch.setattr("streams.ingest.outliers.WINDOW", 50)
    monkeypatch.setattr("streams.ingest.ingest.WINDOW", 50)
    random = np.random.default_rng(3)
    scales = np.exp(0.02 * np.arange(300) + random.choice([0.0, 2.3], 300, p=[0.9, 0.1]) + random.normal(0, 0.05, 300))
    tasks = [make_task(n, scale=float(scale)) for n, scale in enumerate(scales)]
    whole = decisions(open_ingest(), 0, tasks)
    assert 3 < whole.count("outlier") < 100
    with History.open(tmp_path / "restarted", write=True) as history:
        found: list[str] = []
        while len(found) < len(tasks):
            ingest = Ingest(
                *(history, REAL, Limits(backlog=10_000), lambda: 0, lambda *said: None, lambda *said: None),
                outlier_sources=["queue"],
            )
            more = int(random.integers(1, 40))
            found += decisions(ingest, len(found), tasks[len(found) : len(found) + more])
            ingest.close()
    assert found == whole


def test_tasks_that_are_not_stored_or_known_do_not_count(open_ingest: Open, faulty: Faulty) -> None:
    ingest = open_ingest()
    assert bring(ingest, range(MINIMUM - 1)) == ["new"] * (MINIMUM - 1)
    faulty.fault = HistoryFull("the disk is full")
    with pytest.raises(HistoryFull):
        submit(ingest, make_task(50), "unstored")
    faulty.fault = None
    assert submit(ingest, make_task(0), "task-0") == "duplicate"
    assert submit(ingest, make_task(60, scale=1e6), "early") == "new", "29 tasks are too few"
    assert submit(ingest, make_task(61, scale=1e6), "late") == "outlier"


def test_tasks_that_wait_for_their_commit_count(open_ingest: Open, faulty: Faulty) -> None:
    """Otherwise a slow disk would change decisions."""
    ingest = open_ingest()
    faulty.gate = threading.Event()
    futures = [ingest.submit(arrival(make_task(n), f"task-{n}"), wait=True) for n in range(MINIMUM)]
    with pytest.raises(Rejected, match="outlier"):
        ingest.submit(arrival(make_task(99, scale=1e6), "bad"), wait=True)
    assert len(faulty) == 0
    faulty.gate.set()
    assert [future.result(60).round for future in futures] == list(range(MINIMUM))


class Stream:
    """A source of good tasks and one outlier, which is acknowledged as rejected."""

    def __init__(self) -> None:
        self.acked: list[Arrival] = []

    def read(self, after: str | None) -> Iterator[Arrival | None]:
        for n in range(int(after or 0), 50):
            yield arrival(make_task(n, scale=1e6 if n == 40 else 1.0), f"task-{n}", cursor=str(n + 1))
        while True:
            yield None

    def ack(self, arrivals: Any) -> None:
        self.acked += arrivals


def test_a_source_that_is_read_goes_on_after_an_outlier(open_ingest: Open, faulty: Faulty) -> None:
    source = Stream()
    open_ingest().pull("queue", source)
    until(lambda: len(source.acked) == 50)
    assert len(faulty) == 49
    assert [one.id for one in source.acked if one.rejection is not None] == ["task-40"]


def test_a_history_without_scales_has_none(history: History, make_record: Callable[..., Any]) -> None:
    assert history.scales("s", 5) == []
    history.append([make_record(0)])
    assert history.scales("s", 5) == []
    history.append([make_record(n, id=f"n{n}")._replace(scales=Scales(float(n), None)) for n in range(1, 130)])
    assert history.scales("s", 2) == [Scales(128.0, None), Scales(129.0, None)]
    assert len(history.scales("s", WINDOW)) == 129
    assert history.scales("other", 5) == []


def test_the_setting_belongs_to_every_source(tmp_path: Path) -> None:
    raw: dict[str, Any] = {
        "run": {"path": str(tmp_path)},
        "task": {"x_shape": [1], "y": "real", "y_shape": [1]},
        "model": {"build": "trainers.models:mlp", "args": {"inputs": 1, "outputs": 1}, "loss": "mse"},
    }
    tables = [{"kind": "http", "outliers": "quarantine"}, {"kind": "sinusoid"}]
    assert [one.outliers for one in make_config({**raw, "source": tables}, "x").source] == ["quarantine", "accept"]
    for wrong in ("drop", True, ["accept"]):
        with pytest.raises(ConfigError, match=r'outliers = .*: must be one of "accept", "quarantine"') as caught:
            make_config({**raw, "source": [{"kind": "http", "outliers": wrong}]}, "x")
        assert format_value(wrong) in str(caught.value)
