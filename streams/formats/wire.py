"""Encode and decode tasks: safetensors bodies with the tensors support_x, support_y, query_x and query_y.

The header of a body (names, dtypes, shapes, counts) is checked before any tensor is created, so that a hostile body
costs no more memory than its own bytes. Nothing is unpickled.
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

from online_meta.batches import only_tensor, select_samples
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
    """Return the SHA-256 of a body as received (32 bytes), which distinguishes a duplicate from a conflict."""
    return hashlib.sha256(body).digest()


def is_valid_id(id: str, limits: Limits) -> bool:
    """Return whether ``check_id`` accepts the id."""
    return len(id) <= limits.id_length and _ID.fullmatch(id) is not None


def check_id(id: str, limits: Limits) -> None:
    """Raise unless an id matches [A-Za-z0-9][A-Za-z0-9._:-]* and has at most ``limits.id_length`` characters.

    Raises:
        Rejected: with the reason "bad_id".
    """
    if len(id) > limits.id_length:
        raise Rejected("bad_id", f"the id has {len(id)} characters; at most {limits.id_length} are accepted")
    if not _ID.fullmatch(id):
        expected = "it must be an ASCII letter or digit followed by letters, digits, '.', '_', ':' or '-'"
        raise Rejected("bad_id", f"the id is {id[:80]!r}; {expected}")


def encode(task: Task) -> bytes:
    """Encode a task as a safetensors body; equal tasks give equal bytes."""
    tensors = [only_tensor(part) for batch in task for part in (batch.x, batch.y)]
    named = zip(SUPPORT + QUERY, tensors, strict=True)
    # Clone each tensor: the format rejects tensors that share memory, such as slices of one tensor.
    return save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in named})


def decode(body: bytes, spec: TaskSpec, limits: Limits) -> Task:
    """Decode a task from an untrusted body.

    ``x`` keeps the dtype ``spec.x_dtype``; labels become int64 and real targets float32. If the body has no query
    set, part of its support set is held out, see ``hold_out``.

    Args:
        body: a safetensors body with support_x and support_y and either both or neither of query_x and query_y.
        spec: the shape and dtypes of the run's tasks.
        limits: bounds on the body, the samples and the elements.

    Raises:
        Rejected: with one of the reasons of ``streams.types.REASONS``.
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
    """Decode a request to adapt, which consists of support_x, support_y and query_x.

    Args:
        body: a safetensors body with exactly these three tensors.
        spec: the shape and dtypes of the run's tasks.
        limits: bounds on the body, the samples and the elements.

    Returns:
        The support batch, and query_x of shape (n, *spec.x_shape).

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
    """Decode a payload that ``encode`` wrote; no limits apply, because the task was checked on arrival.

    Raises:
        ValueError: if ``encode`` did not write the payload.
    """
    try:
        tensors = load(payload)
        support, query = (Batch(tensors[x], tensors[y]) for x, y in (SUPPORT, QUERY))
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"the payload is not a stored task: {error}") from error
    return Task(support, query)


def hold_out(support: Batch, spec: TaskSpec) -> Task:
    """Split a support set deterministically into a support set and a query set.

    With n samples, q = round(n * query_share), clipped to 1 .. n - 1, become the query. They are evenly spaced: sample
    i, from 0, is held out if floor((i + 1) q / n) exceeds floor(i q / n). Samples are first sorted by label (a stable
    sort), so that a class of m samples contributes m q / n, rounded up or down, in whatever order the samples arrived.
    Both sets keep the order of arrival.

    Args:
        support: n samples.
        spec: gives ``query_share`` and the kind of labels.

    Raises:
        Rejected: with the reason "empty_query" if there are fewer than 2 samples.
    """
    n = len(support.y)
    if n < 2:
        detail = "there is no query set and 1 support sample cannot be split: send query_x and query_y, or 2 samples"
        raise Rejected("empty_query", detail)
    q = min(max(round(n * spec.query_share), 1), n - 1)
    order = torch.argsort(only_tensor(support.y), stable=True) if spec.y == "class" else torch.arange(n)
    position = torch.arange(n)
    is_query = torch.zeros(n, dtype=torch.bool)
    is_query[order] = (position + 1) * q // n > position * q // n
    return Task(select_samples(support, ~is_query), select_samples(support, is_query))


def _check_names(fields: dict[str, TensorInfo], expected: tuple[str, ...]) -> None:
    for name in fields:
        if name not in expected:
            raise Rejected("unknown_tensor", f"unexpected tensor {name[:80]!r}; expected: {', '.join(expected)}")
    for name in expected:
        if name not in fields:
            raise Rejected("missing_tensor", f"the tensor {name!r} is missing; required: {', '.join(expected)}")


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
    """Reject a task whose samples differ in shape, which a dynamic dimension makes possible."""
    support, query = fields["support_x"].shape, fields["query_x"].shape
    if support[1:] != query[1:]:
        both = f"support_x has shape {support} and query_x {query}"
        raise Rejected("wrong_shape", f"{both}; all samples of a task must have the same shape")


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
        raise Rejected("too_large", f"{name} has {field.shape[0]} samples; at most {limits.samples} are accepted")
    if (elements := math.prod(field.shape)) > limits.elements:
        raise Rejected("too_large", f"{name} has {elements} elements; at most {limits.elements} are accepted")


def _load(body: bytes) -> dict[str, Tensor]:
    try:
        return load(body)
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise Rejected("unreadable", f"the body is not valid safetensors: {str(error)[:200]}") from error


def _batch(tensors: dict[str, Tensor], part: str, spec: TaskSpec) -> Batch:
    x, y = _finite(f"{part}_x", tensors[f"{part}_x"]), tensors[f"{part}_y"]
    if spec.y == "real":
        return Batch(x, _finite(f"{part}_y", y.to(torch.float32)))
    labels = y.to(torch.int64)  # an unsigned label of 2^63 or more becomes negative here and is rejected below
    assert spec.ways is not None
    wrong = torch.nonzero((labels < 0) | (labels >= spec.ways))
    if len(wrong):
        at = int(wrong[0])
        found = f"{part}_y has the label {y[at].item()} at sample {at}"
        raise Rejected("label_out_of_range", f"{found}; labels run from 0 to {spec.ways - 1} (ways = {spec.ways})")
    return Batch(x, labels)


def _finite(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype.is_floating_point and not bool(torch.isfinite(tensor).all()):
        # Reduce by sample: a list of all non-finite positions would be many times larger than the tensor.
        at = int(torch.isfinite(tensor).reshape(len(tensor), -1).all(dim=1).to(torch.uint8).argmin())
        raise Rejected("not_finite", f"{name} has NaN or infinity (or exceeds float32) at sample {at}")
    return tensor


_FAST_HEADER_BYTES = 1024


_DTYPES = {"U8": "<u1", "F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8"}


class _TensorCheck(NamedTuple):
    """Where the values of one tensor lie in a body; labels must lie in [0, ``ways``), other values must be finite."""

    dtype: np.dtype[np.generic]
    start: int
    length: int
    ways: int | None


def canonical_bytes(body: bytes, spec: TaskSpec, limits: Limits) -> bytes:
    """Return the payload that the history stores for an untrusted body: the decoded task, encoded by ``encode``.

    Raises:
        Rejected: as ``decode`` does.
    """
    return body if is_canonical(body, spec, limits) else encode(decode(body, spec, limits))


def is_canonical(body: bytes, spec: TaskSpec, limits: Limits) -> bool:
    """Return whether a body is a valid task of this run and equals what ``encode`` would write for it.

    Most clients use ``encode`` and repeat the same header. In that case only the values are checked, which takes a
    tenth of the time of decoding.
    """
    after = 8 + int.from_bytes(body[:8], "little")
    if not (after <= _FAST_HEADER_BYTES and after < len(body) <= limits.body_bytes):
        return False
    checks = _plan_checks(body[:after], len(body), spec, limits)
    return bool(checks) and all(_values_are_valid(body, check) for check in checks)


@lru_cache(maxsize=64)
def _plan_checks(head: bytes, length: int, spec: TaskSpec, limits: Limits) -> tuple[_TensorCheck, ...]:
    """Return the value checks that remain for a body of ``length`` bytes with header ``head``; () if it needs decoding.

    The header is decoded once with a body of zeros. Zero is finite and a valid label, so the decoder rejects such a
    body only for its header.
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
        return bool((values.view(np.uint64) < check.ways).all())  # a negative label becomes 2^63 or more
    return check.dtype.kind != "f" or bool(np.isfinite(values).all())
