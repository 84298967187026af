import ast
import json
import resource
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

import streams
from online_meta.types import Batch, Task
from streams.formats import wire
from streams.formats.safetensors_header import HEADER_BYTES, read_header
from streams.spec import Limits, TaskSpec
from streams.types import Rejected

LIMITS = Limits(body_bytes=100_000, samples=50)
SPEC = TaskSpec(x_shape=(2,), y="class", ways=3)
REAL = TaskSpec(x_shape=(2,), y="real", y_shape=(1,))


def tensors(**changes: Tensor | None) -> dict[str, Tensor]:
    good = {
        "support_x": torch.ones(4, 2),
        "support_y": torch.tensor([0, 1, 2, 0]),
        "query_x": torch.zeros(2, 2),
        "query_y": torch.tensor([1, 2]),
    }
    return {name: tensor for name, tensor in {**good, **changes}.items() if tensor is not None}


def refusal(body: bytes, spec: TaskSpec = SPEC, limits: Limits = LIMITS) -> Rejected:
    with pytest.raises(Rejected) as caught:
        wire.decode(body, spec, limits)
    return caught.value


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("missing_tensor", {"support_y": None}),
        ("missing_tensor", {"query_y": None}),
        ("missing_tensor", {"query_x": None}),
        ("unknown_tensor", {"extra": torch.ones(1)}),
        ("wrong_dtype", {"support_x": torch.ones(4, 2, dtype=torch.float64)}),
        ("wrong_dtype", {"support_x": torch.ones(4, 2, dtype=torch.bfloat16)}),
        ("wrong_dtype", {"support_y": torch.ones(4)}),
        ("wrong_dtype", {"query_y": torch.ones(2, dtype=torch.bool)}),
        ("wrong_shape", {"support_x": torch.ones(4, 3)}),
        ("wrong_shape", {"support_x": torch.ones(4, 2, 1)}),
        ("wrong_shape", {"support_x": torch.ones(8)}),
        ("wrong_shape", {"support_y": torch.zeros(4, 1, dtype=torch.int64)}),
        ("wrong_shape", {"support_y": torch.zeros(3, dtype=torch.int64)}),
        ("wrong_shape", {"support_x": torch.tensor(1.0)}),
        ("empty_support", {"support_x": torch.ones(0, 2), "support_y": torch.ones(0, dtype=torch.int64)}),
        ("empty_query", {"query_x": torch.ones(0, 2), "query_y": torch.ones(0, dtype=torch.int64)}),
        ("too_large", {"support_x": torch.ones(51, 2), "support_y": torch.zeros(51, dtype=torch.int64)}),
        ("not_finite", {"query_x": torch.tensor([[0.0, 0.0], [0.0, torch.nan]])}),
        ("not_finite", {"support_x": torch.full((4, 2), torch.inf)}),
        ("label_out_of_range", {"query_y": torch.tensor([0, 3])}),
        ("label_out_of_range", {"query_y": torch.tensor([0, -1])}),
        ("label_out_of_range", {"query_y": torch.tensor([0, 2**64 - 1], dtype=torch.uint64)}),
        ("label_out_of_range", {"query_y": torch.tensor([0, 2**63], dtype=torch.uint64)}),
    ],
)
def test_each_fault_has_its_reason_and_names_its_tensor(reason: str, changes: dict[str, Tensor | None]) -> None:
    refused = refusal(save(tensors(**changes)))
    assert refused.reason == reason
    assert any(name in refused.detail for name in changes), refused.detail


def test_the_detail_gives_the_actual_and_the_required_value() -> None:
    assert refusal(save(tensors(query_y=torch.tensor([0, 3])))).detail == (
        "query_y has the label 3 at sample 1; labels run from 0 to 2 (ways = 3)"
    )
    assert refusal(save(tensors(support_x=torch.ones(4, 3)))).detail == (
        "support_x has shape (4, 3); it must be (n, 2)"
    )


def body_of(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


ONE = {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}
HUGE = {"dtype": "F32", "shape": [2**50, 2], "data_offsets": [0, 8]}
LABEL = {"dtype": "I64", "shape": [1], "data_offsets": [8, 16]}
TWICE = b'{"support_x": {}, ' + json.dumps({"support_x": ONE, "support_y": LABEL}).encode()[1:]


@pytest.mark.parametrize(
    ("reason", "body"),
    [
        ("unreadable", b""),
        ("unreadable", b"\x00" * 7),
        ("unreadable", b"PK\x03\x04" + b"\x00" * 100),
        ("unreadable", struct.pack("<Q", 2**63) + b"{}"),
        ("unreadable", struct.pack("<Q", 50) + b"{}"),
        ("unreadable", body_of(b"{" + b" " * HEADER_BYTES + b"}")),
        ("unreadable", body_of(b"[" * 60_000)),
        ("unreadable", body_of(b'{"a":' * 10_000)),
        ("unreadable", body_of(b"\xff\xfe{}")),
        ("unreadable", body_of([1, 2])),
        ("unreadable", body_of({"support_x": 3})),
        ("unreadable", body_of({"support_x": {"dtype": "F32", "shape": [-1]}})),
        ("unreadable", body_of({"support_x": {"dtype": "F32", "shape": [True, 2]}})),
        ("unreadable", body_of({"support_x": {"dtype": "F32", "shape": [1.0, 2]}})),
        ("unreadable", body_of({"support_x": {"dtype": "F32", "shape": [10**400, 2]}})),
        ("unreadable", body_of({"support_x": {"dtype": "F32", "shape": [1] * 60}})),
        ("unreadable", body_of(TWICE, b"\x00" * 16)),
        ("unreadable", body_of({"support_x": ONE, "support_y": LABEL}, b"\x00" * 15)),
        ("unreadable", body_of({"support_x": ONE, "support_y": LABEL}, b"\x00" * 17)),
        ("unreadable", body_of({"support_x": ONE, "support_y": {**LABEL, "data_offsets": [0, 8]}}, b"\x00" * 8)),
        ("unreadable", body_of({"support_x": ONE, "support_y": {**LABEL, "data_offsets": [16, 8]}}, b"\x00" * 16)),
        ("too_large", body_of({"support_x": HUGE, "support_y": LABEL}, b"\x00" * 16)),
        ("missing_tensor", body_of({})),
        ("too_large", b"\x00" * (LIMITS.body_bytes + 1)),
    ],
)
def test_a_hostile_body_is_refused(reason: str, body: bytes) -> None:
    assert refusal(body).reason == reason


def test_a_repeated_name_is_refused() -> None:
    with pytest.raises(Rejected, match="occurs twice"):
        read_header(body_of(TWICE), 1_000)


def test_metadata_is_ignored_and_the_tensors_are_writable(make_task: Callable[[int], Task]) -> None:
    body = save(tensors(), metadata={"who": "me"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task = wire.decode(body, SPEC, LIMITS)
        kept = wire.decode_payload(wire.encode(task))
    for tensor in (*task.support, *task.query, *kept.support, *kept.query):
        tensor.add_(1)
    assert wire.decode(body, SPEC, LIMITS).support.x.eq(1).all()


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"])
def test_labels_of_any_integer_dtype_become_int64(dtype: str) -> None:
    labels = torch.tensor([0, 1, 2, 0]).to(getattr(torch, dtype))
    found = wire.decode(save(tensors(support_y=labels)), SPEC, LIMITS).support.y
    assert found.dtype == torch.int64
    assert found.tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_real_targets_become_float32(dtype: torch.dtype) -> None:
    real = tensors(support_y=torch.full((4, 1), 0.5, dtype=dtype), query_y=torch.ones(2, 1))
    found = wire.decode(save(real), REAL, LIMITS).support.y
    assert found.dtype == torch.float32
    assert found.eq(0.5).all()


def test_a_real_target_outside_float32_is_refused() -> None:
    real = tensors(support_y=torch.full((4, 1), 1e300, dtype=torch.float64), query_y=torch.ones(2, 1))
    assert refusal(save(real), REAL).reason == "not_finite"
    real["support_y"] = torch.ones(4, 1, dtype=torch.int64)
    assert refusal(save(real), REAL).reason == "wrong_dtype"


def test_one_support_sample_cannot_be_split() -> None:
    one = {"support_x": torch.ones(1, 2), "support_y": torch.tensor([0])}
    assert refusal(save(one)).reason == "empty_query"


@pytest.mark.parametrize("order", ["sorted", "mixed"])
def test_a_held_out_query_has_the_classes_of_the_support(order: str) -> None:
    labels = torch.arange(10).repeat_interleave(4) if order == "sorted" else torch.arange(10).repeat(4)
    support = Batch(torch.arange(40.0)[:, None], labels)
    task = wire.hold_out(support, TaskSpec(x_shape=(1,), ways=10))
    for half in task:
        assert torch.bincount(half.y, minlength=10).tolist() == [2] * 10
        assert (half.x[1:] > half.x[:-1]).all(), "the order of arrival is kept"
    assert sorted(torch.cat([task.support.x, task.query.x]).flatten().tolist()) == list(range(40))


def test_an_adapt_request_has_only_a_support_and_query_x() -> None:
    support, query_x = wire.decode_support(save(tensors(query_y=None)), SPEC, LIMITS)
    assert support.x.shape == (4, 2)
    assert query_x.shape == (2, 2)
    for reason, changes in [
        ("unknown_tensor", {}),
        ("missing_tensor", {"query_y": None, "query_x": None}),
        ("empty_query", {"query_y": None, "query_x": torch.ones(0, 2)}),
        ("not_finite", {"query_y": None, "query_x": torch.full((1, 2), torch.nan)}),
        ("too_large", {"query_y": None, "query_x": torch.ones(51, 2)}),
    ]:
        with pytest.raises(Rejected) as caught:
            wire.decode_support(save(tensors(**changes)), SPEC, LIMITS)
        assert caught.value.reason == reason


OPEN = TaskSpec(x_shape=(3, -1, -1), ways=3)


def pictures(support: tuple[int, ...], query: tuple[int, ...]) -> dict[str, Tensor]:
    return tensors(support_x=torch.ones(4, *support), query_x=torch.ones(2, *query))


def test_open_dimensions_take_any_one_size_within_a_task() -> None:
    for size in ((3, 1, 1), (3, 5, 7), (3, 28, 28)):
        assert wire.decode(save(pictures(size, size)), OPEN, LIMITS).query.x.shape == (2, *size)
    for wrong in ((3, 5), (1, 5, 7), (3, 5, 7, 1)):
        assert refusal(save(pictures(wrong, wrong)), OPEN).detail.endswith("it must be (n, 3, any, any)")
    empty = refusal(save(pictures((3, 0, 7), (3, 0, 7))), OPEN)
    assert empty.reason == "wrong_shape"
    apart = save(pictures((3, 5, 7), (3, 7, 5)))
    assert refusal(apart, OPEN).reason == "wrong_shape"
    assert "all samples of a task must have the same shape" in refusal(apart, OPEN).detail
    request = pictures((3, 5, 7), (3, 7, 5))
    del request["query_y"]
    with pytest.raises(Rejected, match="all samples of a task must have the same shape"):
        wire.decode_support(save(request), OPEN, LIMITS)


def test_the_number_of_elements_is_checked_before_allocation() -> None:
    limits = Limits(elements=4 * 3 * 5 * 5)
    assert wire.decode(save(pictures((3, 5, 5), (3, 5, 5))), OPEN, limits).support.x.shape == (4, 3, 5, 5)
    refused = refusal(save(pictures((3, 5, 6), (3, 5, 6))), OPEN, limits)
    assert refused.reason == "too_large"
    assert refused.detail == "support_x has 360 elements; at most 300 are accepted"
    huge = {"dtype": "F32", "shape": [4, 3, 2**52, 2**52], "data_offsets": [0, 8]}
    header = {"support_x": huge, "support_y": {"dtype": "I64", "shape": [4], "data_offsets": [8, 40]}}
    assert refusal(body_of(header, bytes(40)), OPEN).reason == "too_large"
    real = TaskSpec(x_shape=(2,), y="real", y_shape=(100,))
    wide = tensors(support_y=torch.ones(4, 100), query_y=torch.ones(2, 100))
    assert (
        refusal(save(wide), real, Limits(elements=399)).detail == "support_y has 400 elements; at most 399 are accepted"
    )


def test_locating_a_nan_takes_little_memory() -> None:
    spec = TaskSpec(x_shape=(1,) * 13 + (-1,), x_dtype="float16", ways=3)
    x = torch.full((1, *(1,) * 13, 2_000_000), torch.nan, dtype=torch.float16)
    body = save({"support_x": x, "support_y": torch.zeros(1, dtype=torch.int64)})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert refusal(body, spec, Limits()).reason == "not_finite"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 150_000, f"{grown} kB; a list of the positions would take about 240,000"
    at_last = tensors(query_x=torch.tensor([[0.0, 0.0], [0.0, -torch.inf]]))
    assert "query_x has NaN or infinity (or exceeds float32) at sample 1" in refusal(save(at_last)).detail


def test_tensors_with_shared_memory_or_other_strides_can_be_encoded() -> None:
    whole = torch.arange(12.0).reshape(2, 6).T
    labels = torch.zeros(6, dtype=torch.int64)
    task = Task(Batch(whole[:4], labels[:4]), Batch(whole[4:], labels[4:]))
    assert wire.decode_payload(wire.encode(task)).query.x.tolist() == whole[4:].tolist()
    assert wire.encode(task) == wire.encode(task)


@pytest.mark.parametrize("payload", [b"", b"x" * 40, save({"support_x": torch.ones(1)})])
def test_an_invalid_stored_payload_raises_a_value_error(payload: bytes) -> None:
    with pytest.raises(ValueError, match="not a stored task"):
        wire.decode_payload(payload)


@pytest.mark.parametrize("id", ["a", "0", "task-1", "A.b_c:d-e", "x" * 200])
def test_good_ids(id: str) -> None:
    wire.check_id(id, Limits())


LOOK_ALIKES = ["\u0430bc", "\uff41bc", "a\u2024b", "a\u2215b", "a\u200bb", "\u0661", "a\u0301"]


@pytest.mark.parametrize(
    "id",
    [
        "..",
        "../a",
        "a\\b",
        "\na",
        "a\r",
        "~",
        "%2e%2e",
        "",
        "-a",
        ".a",
        "a b",
        "a/b",
        "a\n",
        "ä",
        "a\x00",
        "x" * 201,
        "a\udcff",
        *LOOK_ALIKES,
    ],
)
def test_bad_ids(id: str) -> None:
    with pytest.raises(Rejected) as caught:
        wire.check_id(id, Limits())
    assert caught.value.reason == "bad_id"


def test_no_module_of_streams_can_unpickle() -> None:
    for file in Path(streams.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            assert not {"pickle", "shelve", "joblib", "dill", "cloudpickle"} & set(names), file
            is_torch_load = isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load"
            assert not is_torch_load, file
