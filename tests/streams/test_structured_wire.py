"""Named inputs and targets, weights and targets with a shape: what is taken, and what is refused and why."""

import re

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from online_meta.types import Batch, Task
from streams.formats import wire
from streams.spec import InputSpec, Limits, TargetSpec, TaskSpec, require_same
from streams.types import Rejected

LIMITS = Limits(samples=50, elements=2000)
SPEC = TaskSpec(x={"tokens": InputSpec((4,), "int64"), "mask": InputSpec((4,), "uint8")}, ways=3)
PIXELS = TaskSpec(x_shape=(1, 2, 2), ways=3, y_shape=(2, 2))


def tensors(**changes: Tensor | None) -> dict[str, Tensor]:
    """Return the tensors of a task of ``SPEC``; a change of None leaves one out, and __ stands for a dot."""
    found = {}
    for part, n in (("support", 3), ("query", 2)):
        found[f"{part}_x.tokens"] = torch.arange(4 * n).reshape(n, 4)
        found[f"{part}_x.mask"] = torch.ones(n, 4, dtype=torch.uint8)
        found[f"{part}_y"] = torch.arange(n)
    for name, tensor in changes.items():
        found[name.replace("__", ".")] = tensor
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def refusal(body: dict[str, Tensor], spec: TaskSpec = SPEC) -> Rejected:
    with pytest.raises(Rejected) as caught:
        wire.decode(save(body), spec, LIMITS)
    with pytest.raises(Rejected) as again:
        wire.canonical_bytes(save(body), spec, LIMITS)
    assert str(caught.value) == str(again.value)
    return caught.value


def test_named_inputs_are_a_dict_in_the_order_of_their_names() -> None:
    task = wire.decode(save(tensors()), SPEC, LIMITS)
    assert list(task.support.x) == list(SPEC.inputs()) == ["mask", "tokens"]
    assert torch.equal(task.query.x["tokens"], torch.arange(8).reshape(2, 4))
    assert task.query.x["mask"].dtype == torch.uint8
    assert task.support.weight is None
    stored = wire.decode_payload(wire.encode(task))
    assert list(stored.support.x) == ["mask", "tokens"]
    unordered = task._replace(support=task.support._replace(x=dict(reversed(task.support.x.items()))))
    assert wire.encode(unordered) == wire.encode(stored) == wire.encode(task)


def test_a_single_tensor_keeps_its_names() -> None:
    task = Task(Batch(torch.zeros(2, 2), torch.tensor([0, 1])), Batch(torch.ones(1, 2), torch.tensor([1])))
    assert sorted(load(wire.encode(task))) == ["query_x", "query_y", "support_x", "support_y"]


@pytest.mark.parametrize(
    ("reason", "words", "changes"),
    [
        ("missing_tensor", "'query_x.mask' is missing; required: support_x.mask, support_x", {"query_x__mask": None}),
        ("missing_tensor", "'support_y'", {"support_y": None}),
        ("unknown_tensor", "'support_x'; expected: support_x.mask", {"support_x": torch.ones(3, 4)}),
        ("unknown_tensor", "'query_x.words'", {"query_x__words": torch.ones(2, 4)}),
        ("unknown_tensor", "'weight'; expected: .*; optional: support_weight, query_weight", {"weight": torch.ones(3)}),
        ("wrong_dtype", "support_x.mask has dtype 'F32'; it must be U8", {"support_x__mask": torch.ones(3, 4)}),
        (
            "wrong_shape",
            r"x.mask has shape \(2, 3\); it must be \(n, 4\)",
            {"query_x__mask": torch.ones(2, 3).byte()},
        ),
        ("wrong_shape", "support_x.mask has 3 samples and support_y has 2", {"support_y": torch.arange(2)}),
        ("wrong_shape", "query_x.mask has 2 samples and query_weight has 1", {"query_weight": torch.ones(1)}),
        ("wrong_shape", r"support_weight has shape \(3, 1\); it must be \(n,\)", {"support_weight": torch.ones(3, 1)}),
        ("wrong_dtype", "support_weight has dtype 'F64'; it must be F32", {"support_weight": torch.ones(3).double()}),
        ("bad_weight", "support_weight is -0.5 at sample 1", {"support_weight": torch.tensor([1.0, -0.5, 0])}),
        (
            "not_finite",
            "query_weight has NaN .* at sample 1",
            {"query_weight": torch.tensor([1, torch.inf])},
        ),
        ("empty_support", "support_weight is 0 for all samples", {"support_weight": torch.zeros(3)}),
        ("empty_query", "query_weight is 0 for all samples", {"query_weight": torch.zeros(2)}),
    ],
)
def test_a_refusal_names_the_tensor(reason: str, words: str, changes: dict[str, Tensor | None]) -> None:
    found = refusal(tensors(**changes))
    assert found.reason == reason
    assert re.search(words, found.detail), found.detail


def test_weights_are_kept_and_go_with_their_samples_into_a_held_out_query() -> None:
    weight = torch.tensor([1, 0.5, 2])
    task = wire.decode(save(tensors(support_weight=weight)), SPEC, LIMITS)
    assert torch.equal(task.support.weight, weight)
    assert task.query.weight is None
    assert wire.is_canonical(wire.encode(task), SPEC, LIMITS)
    alone = {name: one for name, one in tensors(support_weight=weight).items() if name.startswith("support")}
    held = wire.decode(save(alone), SPEC, LIMITS)
    places = [held.support.x["tokens"][:, 0] // 4, held.query.x["tokens"][:, 0] // 4]
    assert torch.equal(held.support.weight, weight[places[0]])
    assert torch.equal(held.query.weight, weight[places[1]])
    for reason, counting in (("empty_query", places[0]), ("empty_support", places[1])):
        alone["support_weight"] = torch.zeros(3).index_fill(0, counting, 1.0)
        assert refusal(alone).reason == reason


def test_a_request_to_adapt_has_named_inputs_and_may_have_weights() -> None:
    asked = tensors(query_y=None)
    support, x = wire.decode_support(save(asked), SPEC, LIMITS)
    assert list(x) == ["mask", "tokens"]
    assert support.weight is None
    weighted, _ = wire.decode_support(save({**asked, "support_weight": torch.ones(3)}), SPEC, LIMITS)
    assert torch.equal(weighted.weight, torch.ones(3))
    with pytest.raises(Rejected, match="unexpected tensor 'query_weight'"):
        wire.decode_support(save({**asked, "query_weight": torch.ones(2)}), SPEC, LIMITS)


def pixels(**changes: Tensor) -> dict[str, Tensor]:
    y = torch.tensor([[[0, 1], [2, -100]], [[-100, -100], [0, 0]]])
    x = torch.zeros(2, 1, 2, 2)
    return {"support_x": x, "support_y": y, "query_x": x + 1, "query_y": y.clone(), **changes}


def test_classes_may_have_a_shape_and_entries_that_do_not_count() -> None:
    body = save(pixels())
    assert wire.is_canonical(body, PIXELS, LIMITS)
    assert torch.equal(wire.decode(body, PIXELS, LIMITS).query.y, pixels()["query_y"])
    small = save(pixels(query_y=pixels()["query_y"].to(torch.int16)))
    assert wire.canonical_bytes(small, PIXELS, LIMITS) == body
    wrong = refusal(pixels(query_y=torch.full((2, 2, 2), -1)), PIXELS)
    assert str(wrong) == (
        "label_out_of_range: query_y has the label -1 at sample 0; labels run from 0 to 2 (ways = 3), or are -100 "
        "where an entry does not count"
    )
    assert refusal(pixels(support_y=torch.full((2, 2, 2), -100)), PIXELS).reason == "empty_support"
    first = pixels()["query_y"].clone()
    first[0] = -100
    assert refusal(pixels(query_y=first, query_weight=torch.tensor([1.0, 0])), PIXELS).reason == "empty_query"
    assert wire.canonical_bytes(save(pixels(query_y=first, query_weight=torch.tensor([0.0, 1]))), PIXELS, LIMITS)


def test_a_class_of_a_whole_sample_is_never_ignored() -> None:
    assert refusal(tensors(query_y=torch.tensor([0, -100]))).reason == "label_out_of_range"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float16, torch.float64])
def test_labels_and_counts_are_real_targets_of_small_integers_or_floats(dtype: torch.dtype) -> None:
    spec = TaskSpec(x_shape=(), y="real", y_shape=(3,))
    y = torch.tensor([[0, 1, 1], [1, 0, 0]], dtype=dtype)
    body = {"support_x": torch.zeros(2), "support_y": y, "query_x": torch.zeros(2), "query_y": y.clone()}
    found = wire.decode(save(body), spec, LIMITS).query.y
    assert found.dtype == torch.float32
    assert torch.equal(found, y.float())


def test_targets_may_have_names() -> None:
    spec = TaskSpec(x_shape=(1,), targets={"kind": TargetSpec("class", 3), "box": TargetSpec("real", shape=(4,))})
    assert spec.y == "real"
    body = {}
    for part in ("support", "query"):
        body[f"{part}_x"] = torch.zeros(2, 1)
        body[f"{part}_y.kind"], body[f"{part}_y.box"] = torch.tensor([0, 2]), torch.ones(2, 4)
    task = wire.decode(save(body), spec, LIMITS)
    assert list(task.support.y) == ["box", "kind"]
    assert refusal({**body, "query_y.kind": torch.tensor([0, 3])}, spec).reason == "label_out_of_range"
    wrong = refusal({**body, "query_y.box": torch.full((2, 4), torch.nan)}, spec)
    assert (wrong.reason, wrong.detail[:11]) == ("not_finite", "query_y.box")


def test_open_dimensions_are_the_same_in_support_and_query() -> None:
    spec = TaskSpec(x={"tokens": InputSpec((-1,), "int64"), "mask": InputSpec((-1,), "int64")}, ways=2, y_shape=(-1,))

    def part(n: int, length: int) -> dict[str, Tensor]:
        names = [f"{part}_{field}" for part in ("support", "query") for field in ("x.tokens", "x.mask", "y")]
        return {name: torch.zeros(n, length, dtype=torch.int64) for name in names}

    assert wire.decode(save(part(2, 7)), spec, LIMITS).query.y.shape == (2, 7)
    wrong = refusal({**part(2, 7), "query_x.tokens": torch.zeros(2, 6).long()}, spec)
    assert "support_x.tokens has shape (2, 7) and query_x.tokens (2, 6)" in wrong.detail
    assert spec.has_open_dimensions()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, r"x_shape is missing, for example x_shape = \[3, 28, 28\], or a table \[task.x.NAME\]"),
        ({"x": {"a": InputSpec((1,))}, "x_shape": (1,)}, "x names the inputs a: leave out x_shape and x_dtype"),
        ({"x": {"a.b": InputSpec((1,))}}, "x has the name 'a.b'"),
        ({"x": {f"a{i}": InputSpec((1,)) for i in range(33)}}, "x has 33 names; at most 32"),
        ({"x_shape": (1,), "targets": {"a": TargetSpec("real")}}, "targets names a: leave out y, ways and y_shape"),
    ],
)
def test_a_spec_that_contradicts_itself_is_refused(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TaskSpec(**{"ways": 3, **changes})
    with pytest.raises(ValueError, match=r"dtype is 'bool'; it must be one of"):
        InputSpec((1,), "bool")
    with pytest.raises(ValueError, match="kind = 'class' needs the number of classes"):
        TargetSpec("class")


def test_a_source_of_other_inputs_is_refused() -> None:
    with pytest.raises(ValueError, match="source generates tasks with x_shape = None, but the run expects"):
        require_same(TaskSpec(x_shape=(4,), ways=3), SPEC, "mine")
    assert require_same(SPEC, SPEC, "mine") is None
    assert hash(SPEC) == hash(TaskSpec(x=dict(SPEC.x), ways=3))
    assert np.dtype("int64") == SPEC.inputs()["tokens"].dtype
