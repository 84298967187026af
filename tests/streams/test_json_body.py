"""Tasks in JSON: read exactly and strictly, refused with the place, written with the fewest digits."""

import json
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from online_meta.batches import as_named, first_tensor
from online_meta.types import Batch, Task, Tensors
from streams.formats import wire
from streams.formats.json_body import (
    encode_json,
    find_short_example,
    make_example,
    read_as_safetensors,
    tensors_to_json,
)
from streams.formats.safetensors_header import is_json, read_header
from streams.spec import InputSpec, Limits, TargetSpec, TaskSpec
from streams.types import Rejected

LIMITS = Limits()
SPECS = (
    TaskSpec(x_shape=(2,), ways=3),
    TaskSpec(x_shape=(2,), y="real", y_shape=(1,)),
    TaskSpec(x_shape=(2, -1), x_dtype="uint8", ways=300),
    TaskSpec(x_shape=(), x_dtype="int64", y="real"),
    TaskSpec(x_shape=(3,), x_dtype="float64", y="real", y_shape=(2, 2)),
    TaskSpec(x_shape=(1,), x_dtype="float16", ways=2),
)
NAMED = TaskSpec(
    x={"tokens": InputSpec((3,), "int64"), "mask": InputSpec((3,), "uint8")},
    targets={"tags": TargetSpec(ways=3, shape=(3,)), "score": TargetSpec("real")},
)
GOOD = {"support_x": [[1, 2], [3, 4], [5, 6]], "support_y": [0, 1, 2], "query_x": [[7, 8]], "query_y": [1]}


def encode_tensors(tensors: Tensors) -> bytes:
    return save({name or "x": tensor for name, tensor in as_named(tensors).items()})


def refusal(body: bytes | dict[str, Any], spec: TaskSpec = SPECS[0], limits: Limits = LIMITS) -> Rejected:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(Rejected) as caught:
        wire.decode(encode_json(text, spec, limits), spec, limits)
    caught.value.detail.encode()
    return caught.value


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_task_in_json_is_the_same_payload_as_in_safetensors(spec: TaskSpec) -> None:
    random = np.random.default_rng(1)

    def make(n: int) -> Batch:
        shape = (n, *(4 if size == -1 else size for size in spec.x_shape))
        dtype = getattr(torch, spec.x_dtype)
        x = torch.from_numpy(random.uniform(0, 255, shape)).to(dtype)
        if spec.y == "class":
            return Batch(x, torch.from_numpy(random.integers(0, spec.ways or 0, n)))
        return Batch(x, torch.from_numpy(random.normal(size=(n, *spec.y_shape))).float())

    task = Task(make(5), make(3))
    named = {"support_x": task.support.x, "support_y": task.support.y, "query_x": task.query.x, "query_y": task.query.y}
    text = json.dumps({name: tensor.tolist() for name, tensor in named.items()}).encode()
    assert encode_json(text, spec, LIMITS) == wire.encode(task)
    support = {name: named[name].tolist() for name in ("support_x", "support_y")}
    read = wire.canonical_bytes(encode_json(json.dumps(support).encode(), spec, LIMITS), spec, LIMITS)
    assert read == wire.encode(wire.hold_out(task.support, spec))
    assert read_as_safetensors(wire.encode(task), spec, LIMITS) == wire.encode(task)


def test_named_inputs_and_targets_and_weights_are_read() -> None:
    body = {
        "support_x.tokens": [[2**62 + 1, 0, 7], [1, 2, 3]],
        "support_x.mask": [[1, 1, 0], [1, 0, 0]],
        "support_y.tags": [[0, 2, -100], [1, -100, -100]],
        "support_y.score": [0.5, 2],
        "support_weight": [0.25, 1],
    }
    query = {name.replace("support", "query"): values for name, values in body.items()}
    task = wire.decode(encode_json(json.dumps(body | query).encode(), NAMED, LIMITS), NAMED, LIMITS)
    for part, batch in zip(("support", "query"), task, strict=True):
        found = wire.name_fields(part, batch)
        assert {name: tensor.tolist() for name, tensor in found.items()} == (body if part == "support" else query)
    assert task.support.x["mask"].dtype == torch.uint8
    found = refusal({**body, "support_x.mask": [[1, 1, 0], [1, -1, 0]]}, NAMED)
    assert (found.reason, found.detail[:22]) == ("wrong_dtype", "support_x.mask[1][1] i")
    assert refusal({**body, "support_x": [[1]]}, NAMED).reason == "unknown_tensor"
    assert refusal({**body, "support_weight": [-1, 1]}, NAMED).reason == "bad_weight"


def test_whole_numbers_are_exact() -> None:
    spec = TaskSpec(x_shape=(), x_dtype="int64", y="real")
    values = [2**63 - 1, -(2**63), 2**53 + 1, 5.0, -7e2]
    read = encode_json(json.dumps({"support_x": values, "support_y": [0] * 5}).encode(), spec, LIMITS)
    assert load(read)["support_x"].tolist() == [2**63 - 1, -(2**63), 2**53 + 1, 5, -700]


WRONG: dict[str, tuple[dict[str, Any] | bytes, str, str]] = {
    "a string": ({"support_x": [[1, 2], [3, "a"], [5, 6]]}, "wrong_dtype", "support_x[1][1] is a string ('a')"),
    "a number as a string": ({"support_y": [0, 1, "2"]}, "wrong_dtype", "support_y[2] is a string ('2')"),
    "true": ({"query_y": [True]}, "wrong_dtype", "query_y[0] is true; it must be a number"),
    "null": ({"support_x": [[1, 2], [None, 4], [5, 6]]}, "wrong_dtype", "support_x[1][0] is null"),
    "an object": ({"support_x": [[1, 2], [{}, 4], [5, 6]]}, "wrong_dtype", "support_x[1][0] is an object"),
    "a short list": (
        {"support_x": [[1, 2], [3], [5, 6]]},
        "wrong_shape",
        "support_x[1] has the length 1, and support_x[0] the length 2",
    ),
    "a deeper list": ({"support_x": [[1, 2], [3, [4]], [5, 6]]}, "wrong_dtype", "support_x[1][1] is a list"),
    "a number among lists": (
        {"support_x": [[1, 2], 3, [5, 6]]},
        "wrong_shape",
        "support_x[1] is 3, and support_x[0] is a list",
    ),
    "no list": ({"support_x": 3}, "wrong_shape", "support_x is 3; it must be a list of samples"),
    "a text": ({"support_x": "3"}, "wrong_shape", "support_x is a string ('3'); it must be a list of samples"),
    "another shape": ({"support_x": [1, 2, 3]}, "wrong_shape", "support_x has shape (3,); it must be (n, 2)"),
    "no samples": ({"support_x": [], "support_y": []}, "empty_support", "support_x has no samples"),
    "NaN": ({"support_x": [[1, 2], [3, math.nan], [5, 6]]}, "not_finite", "support_x[1][1] is NaN"),
    "too large for float32": ({"query_x": [[1, 1e39]]}, "not_finite", "query_x[0][1] is 1e+39"),
    "too large for any float": ({"query_x": [[10**400, 1]]}, "not_finite", "query_x[0][0] is 1000"),
    "a NaN label": ({"query_y": [math.nan]}, "wrong_dtype", "query_y[0] is nan; it must be a whole number"),
    "half a label": ({"support_y": [0, 1.5, 2]}, "wrong_dtype", "support_y[1] is 1.5; it must be a whole number"),
    "a rounded label": ({"support_y": [0, 2.0**60, 2]}, "wrong_dtype", "support_y[1] is 1.15"),
    "a huge label": ({"support_y": [0, 2**63, 2]}, "wrong_dtype", "support_y[1] is 9223372036854775808; it must lie"),
    "a label out of range": ({"support_y": [0, 1, 3]}, "label_out_of_range", "support_y has the label 3 at sample 2"),
    "an unknown name": (
        {"weights": [1]},
        "unknown_tensor",
        "'weights'; expected: support_x, support_y, support_w",
    ),
    "no object": (b"[1, 2]", "unreadable", "it is a list; it must be an object of lists"),
    "not closed": (b'{"support_x": [[1]', "unreadable", "line 1 column 19"),
    "twice": (b'{"support_x": [], "support_x": []}', "unreadable", "the name 'support_x' occurs twice"),
    "not UTF-8": (b'{"\xff": 1}', "unreadable", "can't decode byte 0xff in position 2"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "unreadable", "BOM"),
    "a comma too many": (b'{"support_x": [1, 2,]}', "unreadable", "column"),
    "half a character": (b'{"\\ud800": 1}', "unknown_tensor", "unexpected name '\\ud800'"),
    "endless digits": (b'{"support_x": [' + b"1" * 5000 + b"]}", "unreadable", "5000 digits"),
    "deep lists": (b'{"support_x": ' + b"[" * 17 + b"1" + b"]" * 17 + b"}", "wrong_shape", "nests more than 16 lists"),
    "endless lists": (b'{"support_x": ' + b"[" * 100_000, "unreadable", "it nests more than 16 lists"),
    "endless objects": (b'{"a":' * 100_000, "unreadable", "it nests more than 16 lists"),
}


@pytest.mark.parametrize("why", WRONG)
def test_a_wrong_body_is_refused_with_its_place(why: str) -> None:
    body, reason, detail = WRONG[why]
    found = refusal(body if isinstance(body, bytes) else GOOD | body)
    assert found.reason == reason
    assert detail in found.detail


@pytest.mark.parametrize("value", [-1, 256, 2**80])
def test_a_number_outside_the_range_of_its_dtype_is_refused(value: int) -> None:
    body = {"support_x": [[[1], [2]], [[3], [value]]], "support_y": [0, 1]}
    found = refusal(body, SPECS[2])
    assert (found.reason, found.detail[:16]) == ("wrong_dtype", "support_x[1][1][")
    assert "it must lie between 0 and 255 (uint8)" in found.detail


def test_bytes_and_elements_are_bounded() -> None:
    limits = Limits(json_bytes=200, elements=4)
    found = refusal(GOOD, limits=limits)
    assert (found.reason, found.detail) == ("too_large", "support_x has 6 elements or more; at most 4 are accepted")
    found = refusal({**GOOD, "query_x": [[0, 0]] * 50}, limits=limits)
    assert found.reason == "too_large"
    assert "in JSON, at most 200 are accepted ([serve.limits] json_bytes): send larger tasks as saf" in found.detail


@pytest.mark.parametrize("piece", [b"[0]", b"{}", b"[[]]", b"[[[[]]]]", b'""', b"1.5"])
def test_reading_takes_at_most_forty_times_the_bytes(piece: bytes) -> None:
    body = b'{"support_x": [' + b",".join([piece] * 50_000) + b"]}"
    tracemalloc.start()
    try:
        with pytest.raises(Rejected):
            wire.decode(encode_json(body, SPECS[0], LIMITS), SPECS[0], LIMITS)
        assert tracemalloc.get_traced_memory()[1] < 40 * len(body)
    finally:
        tracemalloc.stop()


def test_json_is_recognised_by_its_first_bytes() -> None:
    assert all(map(is_json, [b"{}", b" \r\n\t{", b"[", b"\xef\xbb\xbf{", '{"naïve": 1}'.encode()]))
    task = wire.encode(Task(Batch(torch.ones(1, 2), torch.ones(1)), Batch(torch.ones(1, 2), torch.ones(1))))
    assert not any(map(is_json, [b"", b"x,y", b"\0", b"\x93NUMPY", task, bytes([123, 0, 0, 0, 0, 0, 0, 0]) + b"{}"]))


def test_no_header_of_quintillions_of_bytes_is_named() -> None:
    for text in ("héllo wörld", '{"naïve": 1}', "日本語の文字列です"):
        with pytest.raises(Rejected) as caught:
            read_header(text.encode(), 1000)
        assert not any(len(word) > 9 and word.isdigit() for word in caught.value.detail.split())


@pytest.mark.parametrize("spec", [*SPECS, NAMED], ids=str)
def test_the_example_of_a_run_is_a_task_of_it(spec: TaskSpec) -> None:
    task = wire.decode(encode_json(json.dumps(make_example(spec)).encode(), spec, LIMITS), spec, LIMITS)
    assert (len(first_tensor(task.support.y)), len(first_tensor(task.query.y))) == (4, 2)
    request = make_example(spec, targets=False)
    support, query_x = wire.decode_support(encode_json(json.dumps(request).encode(), spec, LIMITS), spec, LIMITS)
    assert encode_tensors(support.x) == encode_tensors(task.support.x)
    assert encode_tensors(query_x) == encode_tensors(task.query.x)
    assert make_example(spec) == make_example(spec)


def test_answers_are_written_with_the_fewest_digits_and_null_for_what_is_not_finite() -> None:
    answer = {
        "predictions": torch.tensor([[0.1, 1e-30], [1 / 3, 1e30]]),
        "half": torch.tensor([0.1], dtype=torch.float16),
        "brain": torch.tensor([0.5], dtype=torch.bfloat16),
        "labels": torch.tensor([2**53 + 1]),
        "bad": torch.tensor([[math.nan, 1.5], [-math.inf, 0.0]]),
    }
    found = tensors_to_json(save(answer))
    assert json.loads(json.dumps(found, allow_nan=False)) == {
        "predictions": [[0.1, 1e-30], [0.33333334, 1e30]],
        "half": [0.1],
        "brain": [0.5],
        "labels": [2**53 + 1],
        "bad": [[None, 1.5], [None, 0.0]],
    }
    assert torch.equal(torch.tensor(found["predictions"]), answer["predictions"])


def test_only_short_examples_are_shown() -> None:
    assert find_short_example(SPECS[0]) == make_example(SPECS[0])
    assert find_short_example(SPECS[0], targets=False) == make_example(SPECS[0], targets=False)
    assert find_short_example(TaskSpec(x_shape=(3, 28, 28), ways=5)) is None
