from collections.abc import Callable, Iterator
from dataclasses import is_dataclass

import numpy as np
import pydantic
import pytest
import torch

import streams.sources
from online_meta.registry import load_module, names
from online_meta.types import Task
from streams.formats import wire
from streams.sources import _synthetic, http, sinusoid
from streams.spec import Limits, TaskSpec
from streams.types import Arrival


def take(stream: Iterator[Arrival | None], n: int) -> list[Arrival]:
    """Return the next ``n`` items of the stream, all of them arrivals."""
    found = [next(stream) for _ in range(n)]
    assert all(isinstance(one, Arrival) for one in found)
    return found


NEEDED: dict[str, dict[str, object]] = {
    "files": {"folder": "x"},
    "python": {"iterator": "x:y"},
    "rows": {"path": "x.csv", "x": ("a",), "y": ("b",), "group_by": "c"},
    "sql": {"url": "sqlite://", "query": "SELECT 1", "cursor": "id", "x": ("a",), "y": ("b",), "group_by": "c"},
    "samples": {"path": "x.csv", "x": ("a",), "y": ("b",), "count": 2},
}
"""The required settings of each kind."""


@pytest.mark.parametrize("kind", names(streams.sources))
def test_each_kind_has_validated_settings(kind: str) -> None:
    module = load_module(streams.sources, kind)
    assert is_dataclass(module.Settings)
    assert module.Settings.__dataclass_params__.frozen
    assert callable(module.create_source)
    needed = NEEDED.get(kind, {})
    assert pydantic.TypeAdapter(module.Settings).validate_python(needed) == module.Settings(**needed)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("sinusoid", {"support": 0}),
        ("sinusoid", {"noise": -1.0}),
        ("sinusoid", {"per_second": 0.0}),
        ("files", {"folder": "x", "poll_seconds": 0}),
        ("rainbow_digits", {"tasks": 0}),
        ("rainbow_digits", {"support_per_class": 499, "query_per_class": 2}),
    ],
)
def test_options_out_of_range_are_refused(kind: str, options: dict) -> None:
    with pytest.raises(pydantic.ValidationError):
        pydantic.TypeAdapter(load_module(streams.sources, kind).Settings).validate_python(options)


def test_the_http_source_has_no_stream(spec: TaskSpec) -> None:
    assert http.create_source(http.Settings(), spec, "http", 0) is None


def test_a_generated_stream_resumes_after_its_cursor_and_then_idles(make_task: Callable[[int], Task]) -> None:
    source = _synthetic.SyntheticSource(make_task, "g", tasks=5)
    all_of_them = take(source.read(None), 5)
    assert [(one.id, one.cursor, one.source) for one in all_of_them] == [(f"g-{t}", str(t), "g") for t in range(5)]
    rest = source.read("2")
    assert take(rest, 2) == all_of_them[3:]
    assert [next(rest) for _ in range(3)] == [None] * 3
    assert next(source.read("4")) is None
    with pytest.raises(ValueError, match="'x' is not a task number"):
        next(source.read("x"))


def test_a_generated_stream_keeps_its_pace(make_task: Callable[[int], Task]) -> None:
    now = [100.0]
    stream = _synthetic.SyntheticSource(make_task, "g", per_second=4.0, clock=lambda: now[0]).read("9")
    seen = []
    for _ in range(9):
        seen.append([one.id for one in iter(lambda: next(stream), None)])
        now[0] += 0.125
    assert seen == [["g-10"], [], ["g-11"], [], ["g-12"], [], ["g-13"], [], ["g-14"]]


def test_a_sinusoid_has_the_distribution_of_the_paper() -> None:
    tasks = [sinusoid.make_task(3, t, 10, 40) for t in range(200)]
    xs = torch.cat([batch.x for task in tasks for batch in task]).double()
    assert float(xs.min()) >= -5
    assert float(xs.max()) <= 5
    assert abs(float(xs.mean())) < 0.1
    for task in tasks:
        x, y = (torch.cat(part).double() for part in zip(*task, strict=True))
        basis = torch.cat([torch.sin(x), torch.cos(x)], dim=1)
        sine, cosine = torch.linalg.lstsq(basis, y).solution.flatten().tolist()
        assert torch.allclose(basis @ torch.tensor([[sine], [cosine]], dtype=torch.double), y, atol=1e-5)
        assert 0.1 <= np.hypot(sine, cosine) <= 5.0
        assert 0.0 <= np.arctan2(-cosine, sine) <= np.pi  # A sin(x - p) = A cos(p) sin x - A sin(p) cos x
    amplitudes = [float(task.query.y.abs().max()) for task in tasks]
    assert min(amplitudes) < 1 < 4 < max(amplitudes)


def test_a_sinusoid_is_a_pure_function_of_seed_and_number() -> None:
    one, again = sinusoid.make_task(3, 8, 4, 5), sinusoid.make_task(3, 8, 4, 5)
    assert wire.encode(one) == wire.encode(again)
    others = [sinusoid.make_task(3, 9, 4, 5), sinusoid.make_task(4, 8, 4, 5), sinusoid.make_task(8, 3, 4, 5)]
    assert not any(torch.equal(one.support.x, other.support.x) for other in others)
    assert one.support.x.shape == (4, 1)
    assert one.query.y.shape == (5, 1)
    noisy = sinusoid.make_task(3, 8, 400, 400, noise=0.5)
    clean = sinusoid.make_task(3, 8, 400, 400)
    assert torch.equal(noisy.support.x, clean.support.x)
    assert 0.4 < float((noisy.support.y - clean.support.y).std()) < 0.6


def test_the_sinusoid_source_yields_tasks_of_its_spec() -> None:
    source = sinusoid.create_source(sinusoid.Settings(tasks=3, support=4, query=2, noise=0.1), sinusoid.SPEC, "sine", 7)
    arrivals = take(source.read(None), 3)
    for t, one in enumerate(arrivals):
        task = wire.decode(one.body, sinusoid.SPEC, Limits())
        assert wire.encode(task) == wire.encode(sinusoid.make_task(7, t, 4, 2, 0.1))
    with pytest.raises(ValueError, match="'sinusoid' source generates tasks with x_shape"):
        sinusoid.create_source(sinusoid.Settings(), TaskSpec(x_shape=(2,), y="real", y_shape=(1,)), "sine", 7)
