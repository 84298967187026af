"""A recorded function returns the function's own bits, and is not used where it does not."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from online_meta.functional import recording
from online_meta.functional.autodiff import value_and_gradient
from online_meta.functional.recording import COMPARED_CALLS, MOST_KINDS, Recorder
from online_meta.rules.adam import adam
from online_meta.types import Batch, Seen

SKIPPED = 2 + COMPARED_CALLS
"""Calls in which the function is called: two before it is recorded, and those that compare."""


@pytest.fixture(autouse=True)
def no_operation_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "SLOW_OPERATION", math.inf)


class Counted:
    """A function that counts its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.function(*args, **kwargs)


def record(function: Callable[..., Any]) -> tuple[Recorder[..., Any], Counted]:
    counted = Counted(function)
    return Recorder(counted, record_after=2, slow=math.inf), counted


def descend(weights: dict[str, Tensor], batch: Batch) -> dict[str, Any]:
    """Take a step of gradient descent on a squared error."""
    assert isinstance(batch.x, Tensor)
    assert isinstance(batch.y, Tensor)

    def error(at: dict[str, Tensor]) -> Tensor:
        return ((batch.x @ at["slope"] + at["shift"] - batch.y) ** 2).mean()

    with torch.no_grad():
        loss, grads = value_and_gradient(error, weights)
    stepped = {name: weights[name].detach() - 0.1 * grad for name, grad in grads.items()}
    return {"weights": stepped, "loss": loss, "kind": ("step", 1)}


def example(seed: int, n: int = 5) -> tuple[dict[str, Tensor], Batch]:
    random = torch.Generator().manual_seed(seed)
    weights = {"slope": torch.randn(3, 2, generator=random), "shift": torch.randn(2, generator=random)}
    return weights, Batch(torch.randn(n, 3, generator=random), torch.randn(n, 2, generator=random))


def bits(found: dict[str, Any]) -> Any:
    return found["kind"], found["loss"].numpy().tobytes(), {k: v.numpy().tobytes() for k, v in found["weights"].items()}


def test_a_record_replaces_the_function_with_the_same_bits() -> None:
    recorder, counted = record(descend)
    for seed in range(20):
        assert bits(recorder(*example(seed))) == bits(descend(*example(seed)))
    assert counted.calls == SKIPPED + 1, "it is called once more to be recorded"


def test_each_shape_has_a_record_of_its_own() -> None:
    recorder, counted = record(descend)
    for seed in range(30):
        arguments = example(seed, n=4 + seed % 2)
        assert bits(recorder(*arguments)) == bits(descend(*arguments))
    assert counted.calls == 2 * (SKIPPED + 1)


def branch(x: Tensor) -> Tensor:
    return x + 1 if x.sum() > 0 else x - 1


def through_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(np.sin(x.numpy()))


def with_a_number(x: Tensor) -> Tensor:
    return x * float(x[0])


def with_a_list(x: Tensor) -> Tensor:
    return x * sum(x.tolist())


def selected(x: Tensor) -> Tensor:
    return x[x > 0].sum()


@pytest.mark.parametrize("function", [branch, through_numpy, with_a_number, with_a_list, selected])
def test_what_depends_on_values_stays_right(function: Callable[[Tensor], Tensor]) -> None:
    recorder, _ = record(function)
    for seed in range(20):
        x = torch.randn(4, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(recorder(x), function(x))


def halved_if_small(x: Tensor) -> Tensor:
    """Take another way for few inputs, by values that numpy reads."""
    return x / 2 if x.detach().numpy()[0] < -1e6 else x


def test_an_operation_that_torchscript_does_not_know_is_recorded_too() -> None:
    recorder, counted = record(lambda x: (x * 2).view(torch.int32) + 1)
    for _ in range(10):
        assert torch.equal(recorder(torch.ones(3)), torch.full((3,), 2.0).view(torch.int32) + 1)
    assert counted.calls < 10


def test_what_numpy_reads_is_not_recorded_even_if_it_rarely_matters() -> None:
    recorder, counted = record(halved_if_small)
    for seed in range(20):
        recorder(torch.randn(4, generator=torch.Generator().manual_seed(seed)))
    assert recorder(torch.full((4,), -4e6)).tolist() == [-2e6] * 4
    assert counted.calls >= 21, "each call is one of the function"


def test_a_function_of_few_slow_operations_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "SLOW_OPERATION", 0.0)
    recorder, counted = record(lambda x: x + 1)
    for _ in range(10):
        recorder(torch.zeros(1))
    assert counted.calls == 11


def test_a_function_that_remembers_is_found_out() -> None:
    calls = [0.0]

    def remember(x: Tensor) -> Tensor:
        calls[0] += 1
        return x + calls[0]

    recorder, counted = record(remember)
    found = [float(recorder(torch.zeros(1))) for _ in range(10)]
    assert counted.calls == 11, "the recorded call is one, and no record is used"
    assert found == [1, 2, 4, 5, 6, 7, 8, 9, 10, 11]


def test_other_strides_are_computed_by_the_function() -> None:
    recorder, counted = record(lambda x: x @ x)
    square = torch.randn(3, 3)
    for _ in range(10):
        recorder(square)
    before = counted.calls
    assert torch.equal(recorder(square.T), square.T @ square.T)
    assert counted.calls == before + 1


def test_other_values_that_are_no_tensors_are_another_kind() -> None:
    recorder, _ = record(lambda x, factor: x * factor)
    x = torch.ones(2)
    for factor in [1, 2, 3] * 8:
        assert recorder(x, factor).tolist() == [factor, factor]
    assert recorder(x, torch.tensor([4.0, 5.0])).tolist() == [4, 5]
    assert recorder(x, factor=6).tolist() == [6, 6]


def test_equal_values_of_other_types_are_another_kind() -> None:
    recorder, _ = record(lambda x, factor: x * factor)
    x = torch.ones(2, dtype=torch.int64)
    for factor in [*[1] * 8, 1.0, 1]:
        assert recorder(x, factor).dtype == (x * factor).dtype


def test_slow_calls_and_too_many_kinds_are_not_recorded() -> None:
    slow = Counted(lambda x: x + 1)
    recorder: Recorder[..., Tensor] = Recorder(slow, record_after=2, slow=0.0)
    for _ in range(10):
        recorder(torch.zeros(1))
    assert slow.calls == 10
    recorder, counted = record(lambda x: x + 1)
    for size in range(1, 3 * MOST_KINDS):
        for _ in range(3):
            assert len(recorder(torch.zeros(size))) == size
    assert counted.calls >= 3 * (2 * MOST_KINDS - 2)


def test_a_record_keeps_no_graph_and_reads_what_it_is_given() -> None:
    recorder, _ = record(lambda weights, batch: descend(weights, batch))
    for seed in range(8):
        recorder(*example(seed))
    weights, batch = example(99)
    weights = {name: value.requires_grad_() for name, value in weights.items()}
    found = recorder({name: value.detach() for name, value in weights.items()}, batch)
    assert bits(found) == bits(descend(*example(99)))
    assert not recorder(weights, batch)["loss"].requires_grad


def test_a_thread_records_while_calls_go_on() -> None:
    counted = Counted(descend)
    executor = ThreadPoolExecutor(1)
    recorder: Recorder[..., Any] = Recorder(counted, record_after=2, slow=math.inf, executor=executor)
    recorder(*example(0))
    recorder(*example(1))
    recorded = executor.submit(int)
    while not recorded.done():
        assert bits(recorder(*example(2))) == bits(descend(*example(2)))
    for seed in range(COMPARED_CALLS):
        assert bits(recorder(*example(seed))) == bits(descend(*example(seed)))
    before = counted.calls
    for seed in range(20):
        assert bits(recorder(*example(seed))) == bits(descend(*example(seed)))
    assert counted.calls == before


def walk(weights: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Take steps of Adam, which joins the weights to one vector and splits it again in each."""
    rule = adam(0.01)

    def error(at: dict[str, Tensor]) -> Tensor:
        return functional.mse_loss(batch.x @ at["slope"] + at["shift"], batch.y)  # type: ignore[operator, arg-type]

    with torch.no_grad():
        carry = rule.start({}, weights, batch)
        for step in range(4):
            carry = rule.update({}, carry, Seen(*value_and_gradient(error, carry.phi)), step)
    return carry.phi


def list_operations(
    recorder: Recorder[..., Any], monkeypatch: pytest.MonkeyPatch, calls: int, function: Callable[..., Any]
) -> list[str]:
    """Call a recorder, and return the operations of what it records."""
    graphs: list[torch.fx.GraphModule] = []
    run = recording._run_without_python
    monkeypatch.setattr(
        recording, "_run_without_python", lambda graph, leaves: graphs.append(graph) or run(graph, leaves)
    )
    for seed in range(calls):
        found, expected = recorder(*example(seed)), function(*example(seed))
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    return [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]


def test_what_is_split_and_joined_again_stays_one_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, counted = record(walk)
    found = list_operations(recorder, monkeypatch, 20, walk)
    assert counted.calls == SKIPPED + 1, "it is recorded"
    joins = 2 + 4  # of the weights and of zeros before the first step, and of the gradient in each
    assert found.count("aten.cat.default") == joins
    assert found.count("aten.split_with_sizes.default") == 4
    assert found.count("aten.ones_like.default") == found.count("aten.mse_loss.default") == 1


def test_parts_that_are_joined_in_another_order_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    def swap(x: Tensor) -> Tensor:
        one, other = torch.split(x * 2, [2, 2])
        return torch.cat([other, one]) + torch.cat([one, other])

    recorder, counted = record(swap)
    for seed in range(10):
        x = torch.randn(4, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(recorder(x), swap(x))
    assert counted.calls < 10


def multiply(weights: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    stacked = torch.stack([weights["slope"]] * 2)
    return {"product": (batch.x @ stacked).exp()}  # type: ignore[operator]


def test_no_operation_hides_that_it_shares_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, counted = record(multiply)
    found = list_operations(recorder, monkeypatch, 20, multiply)
    assert counted.calls == SKIPPED + 1, "it is recorded"
    assert "aten.view.default" in found
    assert "aten._unsafe_view.default" not in found
