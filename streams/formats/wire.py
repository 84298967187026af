"""Encode and decode tasks: safetensors bodies with the tensors support_x, support_y, query_x and query_y.

Named inputs are ``support_x.NAME`` and ``query_x.NAME``, named targets ``support_y.NAME`` and ``query_y.NAME``. The
optional ``support_weight`` and ``query_weight`` (n,) say how much each sample counts.

The header of a body (names, dtypes, shapes, counts) is checked before any tensor is created, so that a hostile body
costs no more memory than its own bytes. Nothing is unpickled.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from online_meta.batches import as_named, first_tensor, from_named, name_tensors, select_samples
from online_meta.tree import copy_aligned
from online_meta.types import Batch, Task, Tensors
from streams.formats.numbers import find_wrong_target
from streams.formats.safetensors_header import TensorInfo, read_header
from streams.spec import DYNAMIC, IGNORED, Limits, TargetSpec, TaskSpec, fits, join_name
from streams.types import Rejected

SUPPORT = ("support_x", "support_y")


QUERY = ("query_x", "query_y")


_SUPPORT, _QUERY = "support", "query"


WEIGHT_DTYPES = ("F32",)


_SAFETENSORS_DTYPES = {"uint8": "U8", "float16": "F16", "float32": "F32", "float64": "F64", "int64": "I64"}


_INTEGERS = ("U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")


_REALS = ("F16", "F32", "F64", "U8", "I8", "U16", "I16")
"""Dtypes of real targets; float32 holds all their integers exactly. A wider integer is rather a class."""


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
    named = {
        name: tensor for part, batch in task._asdict().items() for name, tensor in name_fields(part, batch).items()
    }
    # Clone each tensor: the format rejects tensors that share memory, such as slices of one tensor.
    return save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in named.items()})


def name_fields(part: str, batch: Batch) -> dict[str, Tensor]:
    """Return the tensors of a batch under their names on the wire; ``part`` is "support" or "query"."""
    fields = batch._asdict()
    return {
        name: one for field, value in fields.items() for name, one in name_tensors(f"{part}_{field}", value).items()
    }


def decode(body: bytes, spec: TaskSpec, limits: Limits) -> Task:
    """Decode a task from an untrusted body.

    Inputs keep their dtype; labels become int64 and real targets float32. If the body has no query set, part of its
    support set is held out, see ``hold_out``.

    Args:
        body: a safetensors body with support_x and support_y and either both or neither of query_x and query_y. Named
            inputs and targets are all there. Weights are optional for either set.
        spec: the shape and dtypes of the run's tasks.
        limits: bounds on the body, the samples and the elements.

    Raises:
        Rejected: with one of the reasons of ``streams.types.REASONS``.
    """
    fields = read_header(body, limits.body_bytes)
    known = (_SUPPORT, _QUERY) if any(name.startswith(_QUERY) for name in fields) else (_SUPPORT,)
    _check_names(fields, [name for part in known for name in _list_names(part, "xy", spec)], known)
    for part in known:
        _check_batch(fields, part, spec, limits)
    if _QUERY in known:
        _check_same_samples(fields)
    tensors = _load(body)
    support = _batch(tensors, _SUPPORT, spec)
    return Task(support, _batch(tensors, _QUERY, spec)) if _QUERY in known else hold_out(support, spec)


def decode_support(body: bytes, spec: TaskSpec, limits: Limits) -> tuple[Batch, Tensors]:
    """Decode a request to adapt, which consists of support_x, support_y and query_x.

    Args:
        body: a safetensors body with exactly these tensors, by name where inputs or targets have names, and possibly
            support_weight.
        spec: the shape and dtypes of the run's tasks.
        limits: bounds on the body, the samples and the elements.

    Returns:
        The support batch, and query_x of shape (n, *spec.x_shape), or a dict of the named inputs.

    Raises:
        Rejected: as ``decode`` does.
    """
    fields = read_header(body, limits.body_bytes)
    _check_names(fields, [*_list_names(_SUPPORT, "xy", spec), *_list_names(_QUERY, "x", spec)], (_SUPPORT,))
    _check_batch(fields, _SUPPORT, spec, limits)
    _check_inputs(fields, _QUERY, spec, limits)
    _check_same_samples(fields)
    tensors = _load(body)
    return _batch(tensors, _SUPPORT, spec), _inputs(tensors, _QUERY, spec)


def decode_payload(payload: bytes) -> Task:
    """Decode a payload that ``encode`` wrote; no limits apply, because the task was checked on arrival.

    Raises:
        ValueError: if ``encode`` did not write the payload.
    """
    try:
        tensors = copy_aligned(load(payload))
        return Task(*(gather_batch(tensors, part) for part in (_SUPPORT, _QUERY)))
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"the payload is not a stored task: {error}") from error


def gather_batch(tensors: Mapping[str, Tensor], part: str) -> Batch:
    """Return the batch whose tensors have the names that ``name_fields`` gives; raise ``KeyError`` without x or y."""
    x, y = (gather_tensors(tensors, f"{part}_{field}") for field in "xy")
    return Batch(x, y, tensors.get(f"{part}_weight"))


def gather_tensors(tensors: Mapping[str, Tensor], name: str) -> Tensors:
    """Return the tensor ``name``, or a dict of those called name.KEY; raise ``KeyError`` if there is none."""
    if name in tensors:
        return tensors[name]
    prefix = f"{name}."
    named = {key.removeprefix(prefix): tensors[key] for key in sorted(tensors) if key.startswith(prefix)}
    return named or tensors[name]


def hold_out(support: Batch, spec: TaskSpec) -> Task:
    """Split a support set deterministically into a support set and a query set.

    With n samples, q = round(n * query_share), clipped to 1 .. n - 1, become the query. They are evenly spaced: sample
    i, from 0, is held out if floor((i + 1) q / n) exceeds floor(i q / n). Samples are first sorted by label (a stable
    sort), so that a class of m samples contributes m q / n, rounded up or down, in whatever order the samples arrived.
    Samples without one label each are not sorted. Both sets keep the order of arrival.

    Args:
        support: n samples.
        spec: gives ``query_share`` and the kind of labels.

    Raises:
        Rejected: with the reason "empty_query" if there are fewer than 2 samples, and with "empty_support" or
            "empty_query" if no sample of a set counts.
    """
    n = len(first_tensor(support.y))
    if n < 2:
        detail = "there is no query set and 1 support sample cannot be split: send query_x and query_y, or 2 samples"
        raise Rejected("empty_query", detail)
    q = min(max(round(n * spec.query_share), 1), n - 1)
    y = support.y
    labelled = spec.y == "class" and isinstance(y, Tensor) and y.ndim == 1
    order = torch.argsort(y, stable=True) if labelled and isinstance(y, Tensor) else torch.arange(n)
    position = torch.arange(n)
    is_query = torch.zeros(n, dtype=torch.bool)
    is_query[order] = (position + 1) * q // n > position * q // n
    task = Task(select_samples(support, ~is_query), select_samples(support, is_query))
    for part, batch in task._asdict().items():
        _require_counting(part, batch, spec)
    return task


def _list_names(part: str, fields: str, spec: TaskSpec) -> list[str]:
    """List the names of the required tensors of a part; ``fields`` is "xy" or "x"."""
    known = {"x": [*spec.inputs()], "y": [*spec.list_targets()]}
    return [join_name(f"{part}_{field}", name) for field in fields for name in known[field]]


def _check_names(fields: dict[str, TensorInfo], required: list[str], weighted: tuple[str, ...]) -> None:
    """Reject other tensors than those ``required`` and the weights of the parts that may be ``weighted``."""
    weights = [f"{part}_weight" for part in weighted]
    for name in fields:
        if name not in required and name not in weights:
            expected = f"expected: {', '.join(required)}; optional: {', '.join(weights)}"
            raise Rejected("unknown_tensor", f"unexpected tensor {name[:80]!r}; {expected}")
    for name in required:
        if name not in fields:
            raise Rejected("missing_tensor", f"the tensor {name!r} is missing; required: {', '.join(required)}")


def _check_batch(fields: dict[str, TensorInfo], part: str, spec: TaskSpec, limits: Limits) -> None:
    _check_inputs(fields, part, spec, limits)
    first = join_name(f"{part}_x", next(iter(spec.inputs())))
    for name, target in spec.list_targets().items():
        known = _INTEGERS if target.kind == "class" else _REALS
        _check_tensor(fields, join_name(f"{part}_y", name), known, target.shape, limits)
    if (weight := f"{part}_weight") in fields:
        _check_tensor(fields, weight, WEIGHT_DTYPES, (), limits)
    for name, info in fields.items():
        if name.startswith(f"{part}_") and info.shape[0] != (n := fields[first].shape[0]):
            counts = f"{first} has {n} samples and {name} has {info.shape[0]}"
            raise Rejected("wrong_shape", f"{counts}; they must have the same number")


def _check_inputs(fields: dict[str, TensorInfo], part: str, spec: TaskSpec, limits: Limits) -> None:
    for name, given in spec.inputs().items():
        dtypes = (_SAFETENSORS_DTYPES[given.dtype],)
        _check_tensor(fields, join_name(f"{part}_x", name), dtypes, given.shape, limits)


def _check_same_samples(fields: dict[str, TensorInfo]) -> None:
    """Reject a task whose samples differ in shape, which a dynamic dimension makes possible."""
    for name, info in fields.items():
        other = name.replace(_SUPPORT, _QUERY, 1)
        if name.startswith(_SUPPORT) and other in fields and info.shape[1:] != fields[other].shape[1:]:
            both = f"{name} has shape {info.shape} and {other} {fields[other].shape}"
            raise Rejected("wrong_shape", f"{both}; all samples of a task must have the same shape")


def _check_tensor(
    fields: dict[str, TensorInfo], name: str, dtypes: tuple[str, ...], sample: tuple[int, ...], limits: Limits
) -> None:
    field = fields[name]
    if field.dtype not in dtypes:
        raise Rejected("wrong_dtype", f"{name} has dtype {field.dtype[:20]!r}; it must be {' or '.join(dtypes)}")
    if not (field.shape and fits(field.shape[1:], sample)):
        sizes = "".join(", any" if size == DYNAMIC else f", {size}" for size in sample)
        expected = f"(n{sizes or ','})"
        raise Rejected("wrong_shape", f"{name} has shape {field.shape}; it must be {expected}")
    part = name.split("_")[0]
    if field.shape[0] == 0:
        raise Rejected(_EMPTY_REASONS[part], f"{name} has no samples; a {part} set needs at least 1")
    if field.shape[0] > limits.samples:
        raise Rejected("too_large", f"{name} has {field.shape[0]} samples; at most {limits.samples} are accepted")
    if (elements := math.prod(field.shape)) > limits.elements:
        raise Rejected("too_large", f"{name} has {elements} elements; at most {limits.elements} are accepted")


def _load(body: bytes) -> dict[str, Tensor]:
    try:
        return copy_aligned(load(body))
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise Rejected("unreadable", f"the body is not valid safetensors: {str(error)[:200]}") from error


def _batch(tensors: dict[str, Tensor], part: str, spec: TaskSpec) -> Batch:
    x = _inputs(tensors, part, spec)
    weight = tensors.get(f"{part}_weight")
    targets = {
        name: _target(join_name(f"{part}_y", name), tensors[join_name(f"{part}_y", name)], target, weight)
        for name, target in spec.list_targets().items()
    }
    if weight is not None and bool((_finite(f"{part}_weight", weight) < 0).any()):
        at = int(torch.nonzero(weight < 0)[0])
        raise Rejected("bad_weight", f"{part}_weight is {weight[at].item():g} at sample {at}; a weight is at least 0")
    batch = Batch(x, from_named(targets), weight)
    _require_counting(part, batch, spec)
    return batch


def _inputs(tensors: dict[str, Tensor], part: str, spec: TaskSpec) -> Tensors:
    full = {name: join_name(f"{part}_x", name) for name in spec.inputs()}
    found = {name: _finite(on_wire, tensors[on_wire]) for name, on_wire in full.items()}
    return from_named(found)


def _target(name: str, y: Tensor, target: TargetSpec, weight: Tensor | None) -> Tensor:
    if target.kind == "real":
        y = _finite(name, y.to(torch.float32))
        counted = None if weight is None else weight.numpy() > 0
        if what := find_wrong_target(y.numpy(), target.values, counted):
            raise Rejected("bad_target", f"{name} {what}")
        return y
    labels = y.to(torch.int64)  # an unsigned label of 2^63 or more becomes negative here and is rejected below
    assert target.ways is not None
    outside = (labels < 0) | (labels >= target.ways)
    wrong = torch.nonzero(outside & (labels != IGNORED) if target.shape else outside)
    if len(wrong):
        at = tuple(wrong[0].tolist())
        found = f"{name} has the label {y[at].item()} at sample {at[0]}"
        ignored = f", or are {IGNORED} where an entry does not count" if target.shape else ""
        expected = f"labels run from 0 to {target.ways - 1} (ways = {target.ways}){ignored}"
        raise Rejected("label_out_of_range", f"{found}; {expected}")
    return labels


def _require_counting(part: str, batch: Batch, spec: TaskSpec) -> None:
    """Reject a set in which no sample has a positive weight and an entry with a class: its mean loss is 0 / 0."""
    counts = None if batch.weight is None else batch.weight > 0
    if counts is not None and not bool(counts.any()):
        raise Rejected(_EMPTY_REASONS[part], f"{part}_weight is 0 for all samples; one sample at least must count")
    for name, target in spec.list_targets().items():
        y = as_named(batch.y)[name]
        if target.kind == "class" and target.shape:
            known = (y != IGNORED).flatten(1).any(1)
            if not bool((known if counts is None else known & counts).any()):
                on_wire = join_name(f"{part}_y", name)
                raise Rejected(_EMPTY_REASONS[part], f"all entries of {on_wire} that count are {IGNORED}, of no class")


def _finite(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype.is_floating_point and not np.isfinite(tensor.numpy()).all():
        # Reduce by sample: a list of all non-finite positions would be many times larger than the tensor.
        at = int(torch.isfinite(tensor).reshape(len(tensor), -1).all(dim=1).to(torch.uint8).argmin())
        raise Rejected("not_finite", f"{name} has NaN or infinity (or exceeds float32) at sample {at}")
    return tensor


# Enough for some fifty tensors; the headers that are remembered then take at most 256 KiB.
_FAST_HEADER_BYTES = 4096


_WEIGHTS = {f"{_SUPPORT}_weight", f"{_QUERY}_weight"}


_ONE = np.ones(1, "<f4").tobytes()


_DTYPES = {"U8": "<u1", "F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8"}


class _TensorCheck(NamedTuple):
    """Where the values of one tensor lie in a body, and what they must be.

    Labels lie in [0, ``ways``); with ``ignored``, some may be -100. Weights are at least 0, and one is positive. Other
    values are finite. Real targets, of the ``shape``, are what ``values`` says; the weights of their samples begin at
    ``weights``, if there are any.
    """

    dtype: np.dtype[np.generic]
    start: int
    length: int
    ways: int | None
    ignored: bool
    weight: bool
    shape: tuple[int, ...]
    values: str
    weights: int | None


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

    The header is decoded once with a body of zeros, and weights of 1. Zero is finite and a valid label, and here real
    targets may be any number, so the decoder rejects such a body only for its header.
    """
    try:
        example = _make_example(head, length)
        if encode(decode(example, _accept_any_number(spec), limits)) != example:
            return ()
    except (Rejected, ValueError, KeyError, TypeError):
        return ()
    header = json.loads(head[8:])
    weights = {name for name in header if name in _WEIGHTS}
    targets = {
        join_name(f"{part}_y", name): one for part in (_SUPPORT, _QUERY) for name, one in spec.list_targets().items()
    }
    checks = []
    for name, info in header.items():
        start, end = info["data_offsets"]
        dtype, target = np.dtype(_DTYPES[info["dtype"]]), targets.get(name)
        weight = f"{name.split('_')[0]}_weight"
        ignored = bool(target and target.shape) and weight not in weights
        checks.append(
            _TensorCheck(
                dtype,
                start=len(head) + start,
                length=(end - start) // dtype.itemsize,
                ways=target.ways if target else None,
                ignored=ignored,
                weight=name in weights,
                shape=tuple(info["shape"]),
                values=target.values if target else "numbers",
                weights=len(head) + header[weight]["data_offsets"][0] if weight in weights else None,
            )
        )
    return tuple(checks)


def _accept_any_number(spec: TaskSpec) -> TaskSpec:
    """Return the tasks whose real targets may be any numbers."""
    targets = {name: replace(target, values="numbers") for name, target in spec.targets.items()}
    return replace(spec, y_values="numbers", targets=targets)


def _make_example(head: bytes, length: int) -> bytes:
    """Return a body of ``length`` bytes with the header ``head``, weights of 1 and zeros elsewhere.

    Raises ``ValueError``, ``KeyError`` or ``TypeError`` for a header that is none.
    """
    example = bytearray(head + bytes(length - len(head)))
    if b"_weight" in head:  # Some sample has to count.
        header = json.loads(head[8:])
        for name in _WEIGHTS & set(header):
            begin, end = header[name]["data_offsets"]
            if not (type(begin) is type(end) is int and 0 <= begin <= end <= length - len(head)):
                raise ValueError(f"{name} is not in the body")
            example[len(head) + begin : len(head) + end] = _ONE * ((end - begin) // len(_ONE))
    return bytes(example)


def _values_are_valid(body: bytes, check: _TensorCheck) -> bool:
    values = np.frombuffer(body, check.dtype, check.length, check.start)
    if check.ways is not None:
        known = values.view(np.uint64) < check.ways  # a negative label becomes 2^63 or more
        return bool(known.all()) or (check.ignored and bool(known.any() and (known | (values == IGNORED)).all()))
    if check.weight:
        return bool(np.isfinite(values).all() and (values >= 0).all() and (values > 0).any())
    if check.dtype.kind != "f":
        return True
    if not np.isfinite(values).all():
        return False
    if check.values == "numbers":
        return True
    weights = None if check.weights is None else np.frombuffer(body, "<f4", check.shape[0], check.weights)
    return not find_wrong_target(values.reshape(check.shape), check.values, None if weights is None else weights > 0)
