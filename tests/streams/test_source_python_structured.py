"""The Python source takes tasks of named inputs, named targets and weights; single samples need one tensor of each."""

from collections.abc import Iterator

import pytest
import torch

import online_meta as om
from streams.formats import wire
from streams.sources import python, samples
from streams.spec import InputSpec, Limits, TargetSpec, TaskSpec

SPEC = TaskSpec(
    x={"tokens": InputSpec((3,), "int64"), "mask": InputSpec((3,))},
    targets={"tags": TargetSpec(ways=2, shape=(3,)), "score": TargetSpec("real")},
)


def make_batch(n: int) -> om.Batch:
    x = {"tokens": torch.arange(3 * n).reshape(n, 3), "mask": torch.ones(n, 3)}
    y = {"tags": torch.full((n, 3), -100).index_fill(1, torch.tensor([1]), 1), "score": torch.zeros(n)}
    return om.Batch(x, y, torch.arange(n).float())


def tasks() -> Iterator[om.Task]:
    yield om.Task(make_batch(4), make_batch(2))
    yield om.Task(make_batch(4)._replace(weight=None), make_batch(2))


def test_whole_tasks_have_named_tensors_and_weights() -> None:
    source = python.create_source(python.Settings(f"{__name__}:tasks"), SPEC, "mine", 0)
    arrivals = source.read(None)
    for right in tasks():
        arrival = next(arrivals)
        assert arrival.rejection is None
        found = wire.decode(arrival.body, SPEC, Limits())
        assert list(found.support.x) == ["mask", "tokens"]
        assert wire.encode(found) == wire.encode(right) == wire.canonical_bytes(arrival.body, SPEC, Limits())


@pytest.mark.parametrize("kind", ["python", "samples"])
def test_single_samples_need_one_tensor_of_each(kind: str) -> None:
    module, settings = {
        "python": (python, python.Settings(f"{__name__}:tasks", count=3)),
        "samples": (samples, samples.Settings("rows.csv", ("a",), ("b",), count=3)),
    }[kind]
    with pytest.raises(ValueError, match="takes tasks of one tensor x and one tensor y, not named inputs or targets"):
        module.create_source(settings, SPEC, "mine", 0)
