import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from online_meta.types import Batch, Task
from streams.formats import wire
from streams.spec import DTYPES, Limits, TaskSpec
from streams.types import Rejected

LIMITS = Limits(body_bytes=1_000_000, samples=100)

shapes = st.lists(st.integers(1, 3), max_size=3).map(tuple)


@st.composite
def specs(draw: st.DrawFn) -> TaskSpec:
    x_shape, x_dtype, share = draw(shapes), draw(st.sampled_from(DTYPES)), draw(st.floats(0.01, 0.99))
    if draw(st.booleans()):
        return TaskSpec(x_shape, x_dtype, "class", draw(st.integers(1, 9)), query_share=share)
    return TaskSpec(x_shape, x_dtype, "real", y_shape=draw(shapes), query_share=share)


def batch_of(spec: TaskSpec, n: int, seed: int) -> Batch:
    random = torch.Generator().manual_seed(seed)
    x = (100 * torch.rand(n, *spec.x_shape, generator=random)).to(getattr(torch, spec.x_dtype))
    if spec.y == "class":
        return Batch(x, torch.randint(spec.ways or 1, (n,), generator=random))
    return Batch(x, torch.randn(n, *spec.y_shape, generator=random))


def same(left: Batch, right: Batch) -> bool:
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(left, right, strict=True))


def check_is_a_task_of(spec: TaskSpec, task: Task) -> None:
    for batch in task:
        assert 1 <= len(batch.x) == len(batch.y)
        assert batch.x.shape[1:] == spec.x_shape
        assert batch.y.shape[1:] == spec.y_shape
        assert batch.x.dtype == getattr(torch, spec.x_dtype)
        assert batch.y.dtype == (torch.int64 if spec.y == "class" else torch.float32)
        assert torch.isfinite(batch.x).all()
        assert torch.isfinite(batch.y).all()
        assert spec.y == "real" or (batch.y.min() >= 0 and batch.y.max() < (spec.ways or 0))


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
    support = batch_of(spec, n, seed)._replace(x=torch.arange(n))
    task = wire.hold_out(support, spec)
    assert len(task.query.y) == min(max(round(n * spec.query_share), 1), n - 1)
    assert sorted([*task.support.x.tolist(), *task.query.x.tolist()]) == list(range(n))
    for half in task:
        assert torch.equal(support.y[half.x], half.y)
    if spec.y == "class":
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
    spec = TaskSpec((2,), y="real", y_shape=(1,)) if real else TaskSpec((2,), ways=3)
    body = bytearray(wire.encode(Task(batch_of(spec, 4, 0), batch_of(spec, 2, 1))))
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
}
