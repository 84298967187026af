"""Read and write small tasks as JSON: nested lists under the names of the tensors.

JSON is read strictly and with bounds: UTF-8, no repeated name, numbers only, lists of one length at each depth, whole
numbers exactly. Each refusal names the place, such as ``support_x[3][0]``.
"""

import json
import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save
from safetensors.torch import load
from torch import Tensor

from streams.formats.numbers import EXACT
from streams.formats.safetensors_header import Array, is_json, reject_duplicates
from streams.formats.text import encode_texts
from streams.spec import DYNAMIC, Limits, TaskSpec, join_name
from streams.types import Rejected

MAX_DEPTH = 16
"""The deepest nesting of lists."""

LONGEST_EXAMPLE = 1000
"""The longest example that is shown, in characters of JSON."""

PARTS = ("support", "query")

_KINDS = {str: "a string", bool: "a truth value", type(None): "null", dict: "an object", list: "a list"}


def read_as_safetensors(body: bytes, spec: TaskSpec, limits: Limits) -> bytes:
    """Return a body as safetensors: one in JSON is read, any other returned as it is.

    Raises:
        Rejected: as ``encode_json`` does.
    """
    return encode_json(body, spec, limits) if is_json(body) else body


def encode_json(body: bytes, spec: TaskSpec, limits: Limits) -> bytes:
    """Return the safetensors body that has the tensors of a body in JSON.

    The dtypes are those of the run: a number with a decimal point is accepted where a whole one is needed if it is
    whole and smaller than 2^53. ``wire.decode`` checks everything else: the names, the shapes and the labels.

    Args:
        body: a JSON object of nested lists, such as {"support_x": [[0.5], [1]], "support_y": [0, 1]}. Of a run whose
            samples are texts, ``support_x`` and ``query_x`` may be lists of texts.
        spec: the shape and dtypes of the run's tasks.
        limits: ``json_bytes`` and ``elements`` are used.

    Raises:
        Rejected: with the reason "too_large", "unreadable", "unknown_tensor", "wrong_dtype", "wrong_shape" or
            "not_finite".
    """
    if len(body) > limits.json_bytes:
        raise Rejected(
            "too_large",
            f"the body has {len(body)} bytes; in JSON, at most {limits.json_bytes} are accepted ([serve.limits] "
            "json_bytes): send larger tasks as safetensors",
        )
    tensors, sizes = _parse(body), _sample_sizes(spec)
    texts = _take_texts(tensors, spec, limits)
    for name in tensors:
        if name not in sizes:
            raise Rejected("unknown_tensor", f"unexpected name {name[:80]!r}; expected: {', '.join(sizes)}")
    read = {name: _read_tensor(name, value, *sizes[name], limits.elements) for name, value in tensors.items()}
    return save({**texts, **read})


def _take_texts(tensors: dict[str, Any], spec: TaskSpec, limits: Limits) -> dict[str, Array]:
    """Remove lists of texts from ``tensors``, and return their token ids by the names of the inputs."""
    found: dict[str, Array] = {}
    for field, key in ((f"{part}_x", key) for part in PARTS for key in spec.list_texts()):
        name, text = join_name(field, key), spec.text_of(key)
        value = tensors.get(name)
        if text is None or not isinstance(value, list) or not any(isinstance(item, str) for item in value):
            continue  # Token ids may be sent, too.
        if len(value) * text.length > limits.elements:
            raise Rejected("too_large", f"{name} has {len(value)} texts; at most {limits.elements} tokens are accepted")
        ids = encode_texts(tensors.pop(name), spec, name, key)
        found |= {join_name(field, one): array for one, array in ids.items()}
        for given in found.keys() & tensors.keys():
            raise Rejected("unknown_tensor", f"{given} is given, but it follows from the texts of {name}")
    return found


def _sample_sizes(spec: TaskSpec) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the dtype in which each tensor is read, and the shape of one sample, by name."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for part in PARTS:
        for name, given in spec.inputs().items():
            found[join_name(f"{part}_x", name)] = (given.dtype, given.shape)
        for name, target in spec.list_targets().items():
            found[join_name(f"{part}_y", name)] = ("int64" if target.kind == "class" else "float32", target.shape)
        found[f"{part}_weight"] = ("float32", ())
    return found


def _parse(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body.decode("utf-8"), object_pairs_hook=reject_duplicates)
    except RecursionError as error:
        raise _unreadable(f"it nests more than {MAX_DEPTH} lists") from error
    except ValueError as error:  # of the encoding, of the syntax, of a number of more than 4,300 digits
        raise _unreadable(str(error)[:200]) from error
    if not isinstance(found, dict):
        raise _unreadable(f'it is {_describe(found)}; it must be an object of lists: {{"support_x": [...], ...}}')
    return found


def _read_tensor(name: str, value: Any, dtype: str, sample: tuple[int, ...], most: int) -> Array:
    """Return nested lists as an array. A level at a time, all items of that depth are checked and joined."""
    items, shape = [value], tuple[int, ...]()
    while items and isinstance(items[0], list):
        if len(shape) == MAX_DEPTH:
            raise Rejected("wrong_shape", f"{name} nests more than {MAX_DEPTH} lists")
        _check_lists(name, items, shape)
        shape += (len(items[0]),)
        if math.prod(shape) > most:
            raise Rejected("too_large", f"{name} has {math.prod(shape)} elements or more; at most {most} are accepted")
        items = list(chain.from_iterable(items))
    if not shape:
        raise Rejected("wrong_shape", f"{name} is {_describe(value)}; it must be a list of samples")
    if shape == (0,):  # no samples, of whatever shape
        return np.zeros((0, *(1 if size == DYNAMIC else size for size in sample)), dtype)
    kinds = set(map(type, items))
    if not kinds <= {int, float}:
        at = next(at for at, item in enumerate(items) if type(item) not in (int, float))
        raise Rejected("wrong_dtype", f"{_place(name, at, shape)} is {_describe(items[at])}; it must be a number")
    read = _read_reals if np.dtype(dtype).kind == "f" else _read_whole_numbers
    return read(items, dtype, lambda at: _place(name, at, shape)).reshape(shape)


def _check_lists(name: str, items: list[Any], shape: tuple[int, ...]) -> None:
    """Raise ``Rejected`` unless all items are lists of one length."""
    for at, item in enumerate(items):
        if not isinstance(item, list):
            place, first = _place(name, at, shape), _place(name, 0, shape)
            raise Rejected("wrong_shape", f"{place} is {_describe(item)}, and {first} is a list")
    if len(set(map(len, items))) > 1:
        at = next(at for at, item in enumerate(items) if len(item) != len(items[0]))
        place, first = _place(name, at, shape), _place(name, 0, shape)
        counts = f"{place} has the length {len(items[at])}, and {first} the length {len(items[0])}"
        raise Rejected("wrong_shape", f"{counts}; they must be equal")


Place = Callable[[int], str]


def _read_whole_numbers(items: list[int | float], dtype: str, place: Place) -> Array:
    for at, item in enumerate(items):
        if isinstance(item, float) and not item.is_integer():
            raise Rejected("wrong_dtype", f"{place(at)} is {item!r}; it must be a whole number ({dtype})")
        if isinstance(item, float) and abs(item) >= EXACT:
            detail = f"{place(at)} is {item!r}, which may be rounded: write whole numbers without a decimal point"
            raise Rejected("wrong_dtype", detail)
    range = np.iinfo(dtype)
    if items and not range.min <= min(items) <= max(items) <= range.max:
        at = next(at for at, item in enumerate(items) if not range.min <= item <= range.max)
        expected = f"it must lie between {range.min} and {range.max} ({dtype})"
        raise Rejected("wrong_dtype", f"{place(at)} is {_describe(items[at])}; {expected}")
    return np.array(list(map(int, items)), dtype)


def _read_reals(items: list[int | float], dtype: str, place: Place) -> Array:
    try:
        values = np.array(items, np.float64)
    except OverflowError:  # a whole number above the range of float64
        values = np.array([_to_float(item) for item in items])
    with np.errstate(over="ignore"):
        found = values.astype(dtype)
    finite = np.isfinite(found)
    if not finite.all():
        at = int(finite.argmin())
        raise Rejected("not_finite", f"{place(at)} is {_describe(items[at])}; it must be finite as {dtype}")
    return found


def _to_float(item: int | float) -> float:
    try:
        return float(item)
    except OverflowError:
        return math.inf


def _place(name: str, at: int, shape: tuple[int, ...]) -> str:
    """Return where the item number ``at`` is among the items at the depth of ``shape``, such as "support_x[3][0]"."""
    return name + "".join(f"[{index}]" for index in np.unravel_index(at, shape)) if shape else name


def _describe(item: Any) -> str:
    known = _KINDS.get(type(item))
    if known is None or isinstance(item, bool):
        return json.dumps(item)[:40]
    return f"{known} ({item[:40]!r})" if isinstance(item, str) else known


def _unreadable(what: str) -> Rejected:
    return Rejected("unreadable", f"the body cannot be read as JSON: {what}")


def tensors_to_json(encoded: bytes) -> dict[str, Any]:
    """Return the tensors of trusted safetensors bytes as nested lists by name; NaN and infinite values become None.

    A float32 is written with the fewest digits that give the same float32. The names are sorted, so that equal tensors
    give equal JSON in every process.
    """
    return {name: _to_lists(_to_numpy(tensor)) for name, tensor in sorted(load(encoded).items())}


def _to_numpy(tensor: Tensor) -> Array:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()  # NumPy has no bfloat16


def _to_lists(values: Array) -> Any:
    if values.dtype.kind != "f":
        return values.tolist()
    shortest = values.astype(str).astype(np.float64)
    if np.isfinite(shortest).all():
        return shortest.tolist()
    objects = shortest.astype(object)
    objects[~np.isfinite(shortest)] = None
    return objects.tolist()


def make_example(spec: TaskSpec, *, targets: bool = True) -> dict[str, Any]:
    """Return a task of a run's shapes as nested lists, the same at each call: 4 support and 2 query samples.

    Args:
        spec: the shape and dtypes of the run's tasks. A dynamic dimension has the size 3.
        targets: whether ``query_y`` is included, as in a task; without it, it is a request to adapt.
    """
    return {name: value for name, value in _example_tensors(spec) if targets or not name.startswith("query_y")}


@lru_cache(maxsize=8)
def find_short_example(spec: TaskSpec, *, targets: bool = True) -> dict[str, Any] | None:
    """Return ``make_example`` if it has at most ``LONGEST_EXAMPLE`` characters of JSON, otherwise None."""
    example = make_example(spec, targets=targets)
    return example if len(json.dumps(example)) <= LONGEST_EXAMPLE else None


def _example_tensors(spec: TaskSpec) -> Iterator[tuple[str, Any]]:
    random = np.random.default_rng(0)
    targets = {join_name("y", name): target for name, target in spec.list_targets().items()}
    texts = [join_name("x", name) for name in spec.list_texts()]
    for field in texts:
        yield f"support_{field}", ["how to begin", "a question", "what is new", "an answer"]
        yield f"query_{field}", ["another question", "how to go on"]
    for name, (dtype, sample) in _sample_sizes(spec).items():
        part, _, field = name.partition("_")
        if field in texts or (spec.text is not None and field.partition(".")[0] == "x"):
            continue
        shape = (4 if part == "support" else 2, *(3 if size == DYNAMIC else size for size in sample))
        if field == "weight":
            continue  # optional
        target = targets.get(field)
        if target and target.ways:
            yield name, (np.arange(math.prod(shape)) % target.ways).reshape(shape).tolist()
        elif target and target.values == "counts":
            yield name, random.integers(0, 4, shape).tolist()
        elif target and target.values == "probabilities":
            found = np.zeros(shape)
            found[np.arange(shape[0]), np.arange(shape[0]) % shape[1]] = 1
            yield name, found.tolist()
        elif np.dtype(dtype).kind == "f":
            yield name, np.round(random.uniform(-1, 1, shape), 1).tolist()
        else:
            yield name, random.integers(0, 2, shape).tolist()
