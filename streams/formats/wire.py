"""Bytes <-> tasks: safetensors with the names support_x, support_y, query_x and query_y.

A body is judged by its header alone (names, dtypes, shapes, counts) before any tensor is made, so that a
hostile one costs no more memory than its own bytes. There is no pickle anywhere.
"""

import hashlib
import json
import math
import re
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from online_meta.types import Batch, Task
from streams.formats.safetensors_header import TensorInfo, read_header
from streams.spec import DYNAMIC, Limits, TaskSpec, fits
from streams.types import Rejected

SUPPORT = ("support_x", "support_y")


QUERY = ("query_x", "query_y")


_SAFETENSORS_DTYPES = {"uint8": "U8", "float16": "F16", "float32": "F32", "float64": "F64", "int64": "I64"}


_INTEGERS = ("U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")


_REALS = ("F16", "F32", "F64")


_EMPTY_REASONS = {"support": "empty_support", "query": "empty_query"}


_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*")


def digest(body: bytes) -> bytes:
    """Return the SHA-256 of a body as received, 32 bytes: what tells a duplicate from a conflict."""
    return hashlib.sha256(body).digest()


def is_valid_id(id: str, limits: Limits) -> bool:
    """Return whether ``check_id`` takes the id."""
    return len(id) <= limits.id_length and _ID.fullmatch(id) is not None


def check_id(id: str, limits: Limits) -> None:
    """Refuse an id that is not [A-Za-z0-9][A-Za-z0-9._:-]* of at most ``limits.id_length`` characters.

    Raises:
        Rejected: with the reason "bad_id".
    """
    if len(id) > limits.id_length:
        raise Rejected("bad_id", f"the id has {len(id)} characters; at most {limits.id_length} are kept")
    if not _ID.fullmatch(id):
        expected = "it must begin with an ASCII letter or digit and go on with letters, digits, '.', '_', ':' or '-'"
        raise Rejected("bad_id", f"the id is {id[:80]!r}; {expected}")


def encode(task: Task) -> bytes:
    """Return the task as a safetensors body; the same task always gives the same bytes."""
    tensors = (*task.support, *task.query)
    named = zip(SUPPORT + QUERY, tensors, strict=True)
    # A clone each: the format refuses tensors that share memory, as slices of one tensor do.
    return save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in named})


def decode(body: bytes, spec: TaskSpec, limits: Limits) -> Task:
    """Return the task in a body that anybody may have sent.

    ``x`` keeps the dtype ``spec.x_dtype``; labels become int64 and real targets float32. A body without a
    query has part of its support held out, see ``hold_out``.

    Args:
        body: a safetensors body with support_x, support_y and, both or neither, query_x and query_y.
        spec: what a task of this run must look like.
        limits: how much it may hold.

    Raises:
        Rejected: with one of the reasons of ``streams.types``.
    """
    fields = read_header(body, limits.body_bytes)
    brings_query = any(name in fields for name in QUERY)
    _check_names(fields, SUPPORT + QUERY if brings_query else SUPPORT)
    _check_batch(fields, "support", spec, limits)
    if brings_query:
        _check_batch(fields, "query", spec, limits)
        _check_same_samples(fields)
    tensors = _load(body)
    support = _batch(tensors, "support", spec)
    return Task(support, _batch(tensors, "query", spec)) if brings_query else hold_out(support, spec)


def decode_support(body: bytes, spec: TaskSpec, limits: Limits) -> tuple[Batch, Tensor]:
    """Return the support batch and query_x of a request to adapt: support_x, support_y and query_x, no more.

    Raises:
        Rejected: as ``decode`` does.
    """
    fields = read_header(body, limits.body_bytes)
    _check_names(fields, (*SUPPORT, "query_x"))
    _check_batch(fields, "support", spec, limits)
    _check_x("query_x", fields["query_x"], spec, limits)
    _check_same_samples(fields)
    tensors = _load(body)
    return _batch(tensors, "support", spec), _finite("query_x", tensors["query_x"])


def decode_payload(payload: bytes) -> Task:
    """Return the task of a payload that ``encode`` wrote; no limits, for it was judged when it arrived.

    Raises:
        ValueError: if the payload is not what ``encode`` writes.
    """
    try:
        tensors = load(payload)
        support, query = (Batch(tensors[x], tensors[y]) for x, y in (SUPPORT, QUERY))
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"the payload is not a kept task: {error}") from error
    return Task(support, query)


def hold_out(support: Batch, spec: TaskSpec) -> Task:
    """Split a support set into support and query, the same way every time.

    With n samples, q = round(n * query_share) of them, at least 1 and at most n - 1, become the query. They are
    taken evenly spaced, the later ones of each stretch: the i-th is held out where floor((i + 1) q / n) exceeds
    floor(i q / n). Classes are first brought together (a stable sort by label), so that a class of m samples
    gives m q / n of them, rounded up or down, whether the support came sorted by class or mixed. Within both
    halves the samples keep the order in which they came.

    Raises:
        Rejected: "empty_query", if there are fewer than 2 samples.
    """
    n = len(support.y)
    if n < 2:
        detail = "there is no query, and 1 support sample cannot be split: send query_x and query_y, or 2 samples"
        raise Rejected("empty_query", detail)
    q = min(max(round(n * spec.query_share), 1), n - 1)
    order = torch.argsort(support.y, stable=True) if spec.y == "class" else torch.arange(n)
    position = torch.arange(n)
    is_query = torch.zeros(n, dtype=torch.bool)
    is_query[order] = (position + 1) * q // n > position * q // n
    return Task(Batch(support.x[~is_query], support.y[~is_query]), Batch(support.x[is_query], support.y[is_query]))


def _check_names(fields: dict[str, TensorInfo], expected: tuple[str, ...]) -> None:
    for name in fields:
        if name not in expected:
            raise Rejected("unknown_tensor", f"there is a tensor {name[:80]!r}; known here: {', '.join(expected)}")
    for name in expected:
        if name not in fields:
            raise Rejected("missing_tensor", f"there is no tensor {name!r}; needed: {', '.join(expected)}")


def _check_batch(fields: dict[str, TensorInfo], part: str, spec: TaskSpec, limits: Limits) -> None:
    x, y = fields[f"{part}_x"], fields[f"{part}_y"]
    _check_x(f"{part}_x", x, spec, limits)
    known = _INTEGERS if spec.y == "class" else _REALS
    _check_field(f"{part}_y", y, known, spec.y_shape)
    _check_count(f"{part}_y", y, limits)
    if x.shape[0] != y.shape[0]:
        counts = f"{part}_x has {x.shape[0]} samples and {part}_y has {y.shape[0]}"
        raise Rejected("wrong_shape", f"{counts}; they must have the same number")


def _check_x(name: str, field: TensorInfo, spec: TaskSpec, limits: Limits) -> None:
    _check_field(name, field, (_SAFETENSORS_DTYPES[spec.x_dtype],), spec.x_shape)
    _check_count(name, field, limits)


def _check_same_samples(fields: dict[str, TensorInfo]) -> None:
    """Refuse a task whose samples differ in shape, as they can where a dimension is open."""
    support, query = fields["support_x"].shape, fields["query_x"].shape
    if support[1:] != query[1:]:
        both = f"support_x has shape {support} and query_x {query}"
        raise Rejected("wrong_shape", f"{both}; within a task, all samples have the same shape")


def _check_field(name: str, field: TensorInfo, dtypes: tuple[str, ...], sample: tuple[int, ...]) -> None:
    if field.dtype not in dtypes:
        raise Rejected("wrong_dtype", f"{name} has dtype {field.dtype[:20]!r}; it must be {' or '.join(dtypes)}")
    if not (field.shape and fits(field.shape[1:], sample)):
        sizes = "".join(", any" if size == DYNAMIC else f", {size}" for size in sample)
        expected = f"(n{sizes or ','})"
        raise Rejected("wrong_shape", f"{name} has shape {field.shape}; it must be {expected}")


def _check_count(name: str, field: TensorInfo, limits: Limits) -> None:
    part = name.split("_")[0]
    if field.shape[0] == 0:
        raise Rejected(_EMPTY_REASONS[part], f"{name} has no samples; a {part} set needs at least 1")
    if field.shape[0] > limits.samples:
        raise Rejected("too_large", f"{name} has {field.shape[0]} samples; at most {limits.samples} are taken")
    if (elements := math.prod(field.shape)) > limits.elements:
        raise Rejected("too_large", f"{name} has {elements} numbers; at most {limits.elements} are taken")


def _load(body: bytes) -> dict[str, Tensor]:
    try:
        return load(body)
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise Rejected("unreadable", f"the body is not valid safetensors: {str(error)[:200]}") from error


def _batch(tensors: dict[str, Tensor], part: str, spec: TaskSpec) -> Batch:
    x, y = _finite(f"{part}_x", tensors[f"{part}_x"]), tensors[f"{part}_y"]
    if spec.y == "real":
        return Batch(x, _finite(f"{part}_y", y.to(torch.float32)))
    labels = y.to(torch.int64)  # an unsigned label of 2^63 or more turns negative here, and so is refused below
    assert spec.ways is not None
    wrong = torch.nonzero((labels < 0) | (labels >= spec.ways))
    if len(wrong):
        at = int(wrong[0])
        found = f"{part}_y has the label {y[at].item()} at sample {at}"
        raise Rejected("label_out_of_range", f"{found}; labels run from 0 to {spec.ways - 1} (ways = {spec.ways})")
    return Batch(x, labels)


def _finite(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype.is_floating_point and not bool(torch.isfinite(tensor).all()):
        # By sample: a list of all the places would be many times as large as the tensor.
        at = int(torch.isfinite(tensor).reshape(len(tensor), -1).all(dim=1).to(torch.uint8).argmin())
        raise Rejected("not_finite", f"{name} has NaN or infinity (or exceeds float32) at sample {at}")
    return tensor


_FAST_HEADER_BYTES = 1024


_DTYPES = {"U8": "<u1", "F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8"}


class _TensorCheck(NamedTuple):
    """Where the values of one tensor lie in a body; labels lie in [0, ``ways``), all others are finite."""

    dtype: np.dtype[np.generic]
    start: int
    length: int
    ways: int | None


def canonical_bytes(body: bytes, spec: TaskSpec, limits: Limits) -> bytes:
    """Return what the history keeps of a body that anybody may have sent: what ``encode`` makes of its task.

    Raises:
        Rejected: as ``wire.decode`` does.
    """
    return body if is_canonical(body, spec, limits) else encode(decode(body, spec, limits))


def is_canonical(body: bytes, spec: TaskSpec, limits: Limits) -> bool:
    """Return whether a body is a task of this run, and is just what ``encode`` makes of it.

    Most senders use ``encode``, and send the same header over and over again. Then only the values are looked at, which
    takes a tenth of the time that decoding does.
    """
    after = 8 + int.from_bytes(body[:8], "little")
    if not (after <= _FAST_HEADER_BYTES and after < len(body) <= limits.body_bytes):
        return False
    checks = _plan_checks(body[:after], len(body), spec, limits)
    return bool(checks) and all(_values_are_valid(body, check) for check in checks)


@lru_cache(maxsize=64)
def _plan_checks(head: bytes, length: int, spec: TaskSpec, limits: Limits) -> tuple[_TensorCheck, ...]:
    """Return what is left to look at in a body of so many bytes that begins so; () if it needs decoding.

    Zeros are finite, and a label: the decoder takes a body of them where nothing but its values could be wrong.
    """
    zeros = head + bytes(length - len(head))
    try:
        if encode(decode(zeros, spec, limits)) != zeros:
            return ()
    except Rejected:
        return ()
    checks = []
    for name, info in json.loads(head[8:]).items():
        start, end = info["data_offsets"]
        dtype = np.dtype(_DTYPES[info["dtype"]])
        ways = spec.ways if name.endswith("_y") and spec.y == "class" else None
        checks.append(_TensorCheck(dtype, len(head) + start, (end - start) // dtype.itemsize, ways))
    return tuple(checks)


def _values_are_valid(body: bytes, check: _TensorCheck) -> bool:
    values = np.frombuffer(body, check.dtype, check.length, check.start)
    if check.ways is not None:
        return bool((values.view(np.uint64) < check.ways).all())  # a negative one becomes 2^63 or more
    return check.dtype.kind != "f" or bool(np.isfinite(values).all())
