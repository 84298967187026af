from typing import get_args

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from online_meta.batches import as_named, count_samples, from_named
from online_meta.types import Batch, Task
from streams.formats import wire
from streams.spec import DTYPES, IGNORED, InputSpec, Limits, TargetSpec, TaskSpec, Values
from streams.types import Rejected

LIMITS = Limits(body_bytes=1_000_000, samples=100)

NAMED = TaskSpec(x={"tokens": InputSpec((2,), "int64"), "mask": InputSpec((2,), "uint8")}, ways=3, y_shape=(2,))

shapes = st.lists(st.integers(1, 3), max_size=3).map(tuple)


names = st.sampled_from(["tokens", "mask", "_", "Z9"])


@st.composite
def inputs(draw: st.DrawFn) -> InputSpec:
    return InputSpec(draw(shapes), draw(st.sampled_from(DTYPES)))


@st.composite
def targets(draw: st.DrawFn) -> TargetSpec:
    if draw(st.booleans()):
        return TargetSpec("class", draw(st.integers(1, 9)), draw(shapes))
    shape = draw(shapes)
    return TargetSpec("real", shape=shape, values=draw(st.sampled_from(get_args(Values)[: 3 if shape else 2])))


@st.composite
def specs(draw: st.DrawFn) -> TaskSpec:
    share, x, y = draw(st.floats(0.01, 0.99)), draw(inputs()), draw(targets())
    named = {} if draw(st.booleans()) else draw(st.dictionaries(names, inputs(), min_size=1, max_size=3))
    several = {} if draw(st.booleans()) else draw(st.dictionaries(names, targets(), min_size=1, max_size=3))
    about_x = {"x": named} if named else {"x_shape": x.shape, "x_dtype": x.dtype}
    about_y = (
        {"targets": several} if several else {"y": y.kind, "ways": y.ways, "y_shape": y.shape, "y_values": y.values}
    )
    return TaskSpec(**about_x, **about_y, query_share=share)


def batch_of(spec: TaskSpec, n: int, seed: int) -> Batch:
    """Return random samples; some seeds give weights, others ignored entries in targets with a shape."""
    random = torch.Generator().manual_seed(seed)
    x = {
        name: (100 * torch.rand(n, *one.shape, generator=random)).to(getattr(torch, one.dtype))
        for name, one in spec.inputs().items()
    }
    y = {}
    for name, one in spec.list_targets().items():
        if one.kind == "real":
            y[name] = torch.randn(n, *one.shape, generator=random)
            if one.values == "counts":
                y[name] = (5 * y[name]).abs().floor()
            elif one.values == "probabilities":
                y[name] = y[name].softmax(1)
            continue
        y[name] = torch.randint(one.ways or 1, (n, *one.shape), generator=random)
        if one.shape and seed % 4 == 1:
            y[name].view(-1)[1::3] = IGNORED
    weight = torch.cat([torch.ones(1), 2 * torch.rand(n - 1, generator=random).round()]) if seed % 4 > 1 else None
    return Batch(from_named(x), from_named(y), weight)


def same(left: Batch, right: Batch) -> bool:
    one, other = wire.name_fields("support", left), wire.name_fields("support", right)
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one
    )


def check_is_a_task_of(spec: TaskSpec, task: Task) -> None:
    for batch in task:
        x, y = as_named(batch.x), as_named(batch.y)
        assert list(x) == list(spec.inputs())
        assert list(y) == list(spec.list_targets())
        assert len({len(one) for one in (*x.values(), *y.values())}) == 1
        assert count_samples(batch) >= 1
        for name, one in spec.inputs().items():
            assert x[name].shape[1:] == one.shape
            assert x[name].dtype == getattr(torch, one.dtype)
            assert torch.isfinite(x[name]).all()
        for name, target in spec.list_targets().items():
            assert y[name].shape[1:] == target.shape
            assert y[name].dtype == (torch.int64 if target.kind == "class" else torch.float32)
            assert torch.isfinite(y[name]).all()
            if target.kind == "class":
                known = y[name] if not target.shape else y[name][y[name] != IGNORED]
                assert len(known)
                assert known.min() >= 0
                assert known.max() < (target.ways or 0)
            elif target.values == "counts":
                assert (y[name] >= 0).all()
                assert torch.equal(y[name], y[name].round())
            elif target.values == "probabilities":
                counted = y[name] if batch.weight is None else y[name][batch.weight > 0]
                assert (y[name] >= 0).all()
                assert ((counted.double().sum(1) - 1).abs() <= 1.001e-3).all()
        if batch.weight is not None:
            assert batch.weight.shape == (count_samples(batch),)
            assert torch.isfinite(batch.weight).all()
            assert batch.weight.min() >= 0
            assert batch.weight.max() > 0


@settings(max_examples=150, deadline=None)
@given(specs(), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32))
def test_encoding_round_trips(spec: TaskSpec, support: int, query: int, seed: int) -> None:
    task = Task(batch_of(spec, support, seed), batch_of(spec, query, seed + 1))
    body = wire.encode(task)
    for found in (wire.decode(body, spec, LIMITS), wire.decode_payload(body)):
        assert same(found.support, task.support)
        assert same(found.query, task.query)
        assert wire.encode(found) == body


@settings(max_examples=150, deadline=None)
@given(specs(), st.integers(2, 40), st.integers(0, 2**32))
def test_a_held_out_query_is_part_of_the_support(spec: TaskSpec, n: int, seed: int) -> None:
    support = batch_of(spec, n, 4 * seed)._replace(x=torch.arange(n))
    task = wire.hold_out(support, spec)
    assert count_samples(task.query) == min(max(round(n * spec.query_share), 1), n - 1)
    assert sorted([*task.support.x.tolist(), *task.query.x.tolist()]) == list(range(n))
    for half in task:
        for name, y in as_named(support.y).items():
            assert torch.equal(y[half.x], as_named(half.y)[name])
    if spec.y == "class" and not spec.y_shape:
        for label, m in enumerate(torch.bincount(support.y).tolist()):
            held = int((task.query.y == label).sum())
            assert abs(held - m * len(task.query.y) / n) < 1


@settings(max_examples=600, deadline=None)
@given(
    st.data(),
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=6),
    st.one_of(st.none(), st.integers(0, 2000)),
)
def test_a_mutated_body_is_a_task_or_rejected(
    data: st.DataObject, real: bool, changes: list[tuple[int, int]], cut: int | None
) -> None:
    values = data.draw(st.sampled_from(get_args(Values)))
    spec = TaskSpec((2,), y="real", y_shape=(2,), y_values=values) if real else NAMED
    body = bytearray(wire.encode(Task(batch_of(spec, 4, 0), batch_of(spec, 2, 3))))
    for at, value in changes:
        body[at % len(body)] = value
    if cut is not None:
        del body[cut % len(body) :]
    if data.draw(st.booleans(), "grow"):
        body += data.draw(st.binary(max_size=20))
    found = decode_or_refuse(bytes(body), spec)
    if isinstance(found, Rejected):
        assert found.reason in REASONS
        assert len(found.detail) < 600
    else:
        check_is_a_task_of(spec, found)


def decode_or_refuse(body: bytes, spec: TaskSpec) -> Task | Rejected:
    try:
        return wire.decode(body, spec, LIMITS)
    except Rejected as refusal:
        return refusal


REASONS = {
    "too_large",
    "unreadable",
    "missing_tensor",
    "unknown_tensor",
    "wrong_dtype",
    "wrong_shape",
    "empty_support",
    "empty_query",
    "not_finite",
    "label_out_of_range",
    "bad_target",
    "bad_weight",
}
