"""The fast path for canonical bodies gives what the decoder gives, and refuses what the decoder refuses."""

import json
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from online_meta.types import Batch, Task
from streams.formats import wire
from streams.formats.wire import canonical_bytes, is_canonical
from streams.history.history import History
from streams.spec import InputSpec, Limits, TargetSpec, TaskSpec
from streams.types import BacklogFull, IngestClosed, Receipt, Rejected
from tests.streams.test_wire_properties import LIMITS, batch_of, specs
from tests.support.ingesting import DEADLINE, Arrive, Counts, Open

SPEC = TaskSpec((2,), ways=3)


def decode(body: bytes, spec: TaskSpec) -> bytes | str:
    try:
        return wire.encode(wire.decode(body, spec, LIMITS))
    except Rejected as refusal:
        return str(refusal)


def fast_path(body: bytes, spec: TaskSpec) -> bytes | str:
    try:
        return canonical_bytes(body, spec, LIMITS)
    except Rejected as refusal:
        return str(refusal)


@settings(max_examples=150, deadline=None)
@given(specs(), st.integers(1, 12), st.integers(0, 2**32), st.data())
def test_the_fast_path_agrees_with_the_decoder(spec: TaskSpec, n: int, seed: int, data: st.DataObject) -> None:
    body = wire.encode(Task(batch_of(spec, n, seed), batch_of(spec, n, seed + 1)))
    assert is_canonical(body, spec, LIMITS)
    assert canonical_bytes(body, spec, LIMITS) is body
    changed = bytearray(body)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.sampled_from([0, 1, 127, 128, 255]))
    for other in (bytes(changed), body[:-1], body + b"\0"):
        assert fast_path(other, spec) == decode(other, spec)


def test_a_task_of_three_inputs_three_targets_and_weights_takes_the_fast_path() -> None:
    inputs = {name: InputSpec((2,), "float64") for name in ("first", "second", "third")}
    targets = {f"target_{name}": TargetSpec("class", 4, (2, 2, 3)) for name in inputs}
    spec = TaskSpec(x=inputs, targets=targets)
    assert is_canonical(wire.encode(Task(batch_of(spec, 12, 2), batch_of(spec, 12, 3))), spec, LIMITS)


def test_a_valid_body_that_is_not_canonical_is_decoded() -> None:
    from safetensors.torch import save

    x, y = torch.zeros(2, 2), torch.tensor([0, 2])
    named = {"support_x": x, "support_y": y, "query_x": x + 1, "query_y": y.clone()}
    plain = wire.encode(Task(Batch(x, y), Batch(x + 1, y)))
    assert save(named) == plain
    noted = save(named, metadata={"made": "elsewhere"})
    narrow = save({**named, "query_y": y.to(torch.uint8)})
    for body in (noted, narrow):
        assert not is_canonical(body, SPEC, LIMITS)
        assert canonical_bytes(body, SPEC, LIMITS) == plain


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        ("query_x", struct.pack("<f", np.nan), "not_finite"),
        ("support_x", struct.pack("<f", -np.inf), "not_finite"),
        ("query_y", struct.pack("<q", -1), "label_out_of_range"),
        ("support_y", struct.pack("<q", 3), "label_out_of_range"),
    ],
)
def test_the_fast_path_checks_values(at: str, value: bytes, reason: str) -> None:
    batch = Batch(torch.zeros(2, 2), torch.tensor([0, 2]))
    body = wire.encode(Task(batch, batch))
    assert is_canonical(body, SPEC, LIMITS)
    after = 8 + int.from_bytes(body[:8], "little")
    end = after + json.loads(body[8:after])[at]["data_offsets"][1]
    poison = body[: end - len(value)] + value + body[end:]
    assert not is_canonical(poison, SPEC, LIMITS)
    with pytest.raises(Rejected) as caught:
        canonical_bytes(poison, SPEC, LIMITS)
    assert caught.value.reason == reason


COUNTS = TaskSpec((2,), y="real", y_shape=(2,), y_values="counts")
SHARES = TaskSpec((2,), y="real", y_shape=(2,), y_values="probabilities")


@pytest.mark.parametrize(
    ("spec", "y", "message"),
    [
        (COUNTS, [[0, 3], [2.5, 1]], "query_y is 2.5 at sample 1; a count is a whole number of 0 or more"),
        (COUNTS, [[0, -1], [2, 1]], "query_y is -1 at sample 0; a count is a whole number of 0 or more"),
        (SHARES, [[0.5, 0.5], [0.5, 0.6]], "query_y sums to 1.1 over the classes at sample 1; soft labels sum to 1"),
        (SHARES, [[1.5, -0.5], [0, 1]], "query_y is -0.5 at sample 0; a soft label is at least 0"),
        (SHARES, [[0.5, 0.5], [0, 1.0011]], "query_y sums to 1.0011 over the classes at sample 1"),
    ],
)
def test_counts_and_soft_labels_are_checked_by_both_paths(spec: TaskSpec, y: list[list[float]], message: str) -> None:
    right = torch.tensor([[1.0, 0], [0, 1]])
    body = wire.encode(Task(Batch(torch.zeros(2, 2), right), Batch(torch.zeros(2, 2), torch.tensor(y).float())))
    assert is_canonical(body, replace(spec, y_values="numbers"), LIMITS)
    assert not is_canonical(body, spec, LIMITS)
    for read in (decode, fast_path):
        found = read(body, spec)
        assert isinstance(found, str)
        assert found.startswith(f"bad_target: {message}")


@pytest.mark.parametrize(
    ("spec", "y", "weight"),
    [
        (COUNTS, [[0, 3], [2**24, 1]], None),
        (SHARES, [[0.5, 0.5], [0, 1.0009]], None),
        (SHARES, [[0.5, 0.5], [0, 0]], [1, 0]),  # padding
        (replace(SHARES, y_shape=(2, 3)), [[[0, 0.5, 1], [1, 0.5, 0]], [[1, 1, 1], [0, 0, 0]]], None),
    ],
)
def test_right_counts_and_soft_labels_are_canonical(
    spec: TaskSpec, y: list[list[float]], weight: list[float] | None
) -> None:
    weights = None if weight is None else torch.tensor(weight, dtype=torch.float32)
    batch = Batch(torch.zeros(2, 2), torch.tensor(y, dtype=torch.float32), weights)
    body = wire.encode(Task(batch, batch))
    assert is_canonical(body, spec, LIMITS)
    assert decode(body, spec) == body


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([COUNTS, SHARES, replace(SHARES, y_shape=(3, 2))]), st.booleans())
def test_both_paths_agree_on_the_edge_of_what_is_right(seed: int, spec: TaskSpec, weighted: bool) -> None:
    random = np.random.default_rng(seed)

    def make() -> Batch:
        y = random.uniform(0, 1, (3, *spec.y_shape))
        y = y / y.sum(1, keepdims=True) * (1 + random.choice([0, 0.000999, 0.001, 0.001001, -0.001])) + 0.0
        y = (
            y
            if spec.y_values == "probabilities"
            else random.choice([0, 1, 2, 0.5, -1], size=y.shape, p=[0.4, 0.3, 0.2, 0.05, 0.05])
        )
        weight = torch.from_numpy(random.integers(0, 2, 3)).float() if weighted else None
        return Batch(torch.zeros(3, 2), torch.from_numpy(y).float(), weight)

    body = wire.encode(Task(make(), make()))
    found = decode(body, spec)
    assert fast_path(body, spec) == found
    assert is_canonical(body, spec, LIMITS) == isinstance(found, bytes)


def test_the_fast_path_checks_limits() -> None:
    batch = Batch(torch.zeros(3, 2), torch.tensor([0, 1, 2]))
    body = wire.encode(Task(batch, batch))
    assert is_canonical(body, SPEC, Limits(samples=3, body_bytes=len(body)))
    for limits in (Limits(samples=2), Limits(body_bytes=len(body) - 1)):
        assert not is_canonical(body, SPEC, limits)


def test_only_canonical_new_tasks_are_queued_without_waiting(
    open_ingest: Open, arrive: Arrive, faulty: History, counts: Counts
) -> None:
    one = open_ingest(backlog=1)
    queued = one.submit_nowait(arrive(0))
    assert queued is not None
    assert queued.result(DEADLINE) == Receipt("task-0", 0, duplicate=False)
    assert faulty.payload(0) == arrive(0).body
    assert faulty.entry(0).digest == wire.digest(arrive(0).body)
    for other in (arrive(0), arrive(1, id="a/b"), arrive(1)._replace(body=b"nothing")):
        assert one.submit_nowait(other) is None
    assert counts.rejected == [], "submit counts them"
    with pytest.raises(BacklogFull):
        one.submit_nowait(arrive(1))
    one.close()
    counts.learned = 1
    with pytest.raises(IngestClosed):
        one.submit_nowait(arrive(2))
