"""Define the shape of a run's tasks and the limits on arrivals."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt

Dtype = Literal["uint8", "float16", "float32", "float64", "int64"]
"""The dtypes of a sample ``x``."""

Shape = tuple[Annotated[int, Ge(1)], ...]
"""The shape of one sample, without the leading sample dimension; () is a scalar."""

DYNAMIC = -1
"""A dynamic dimension: any size of 1 or more, which may differ between tasks."""

DynamicShape = tuple[Annotated[int, Ge(DYNAMIC)], ...]
"""A shape that may have dynamic dimensions."""

DTYPES = ("uint8", "float16", "float32", "float64", "int64")


@dataclass(frozen=True)
class TaskSpec:
    """The shape and dtypes that every task of a run must have.

    Attributes:
        x_shape: the shape of one sample ``x``; a batch has shape (n, *x_shape). A dimension of -1 is dynamic: any size
            of 1 or more, equal for all samples of a task but possibly different between tasks. ``Limits.elements``
            bounds it.
        x_dtype: the dtype that ``x`` must have on arrival.
        y: "class" (labels 0 .. ways - 1) or "real" (regression targets, stored as float32).
        ways: the number of classes; required if ``y`` is "class", otherwise not allowed.
        y_shape: the shape of one sample's ``y``; () for "class".
        query_share: the fraction of the support that is held out as the query set if a task has none, in (0, 1).
        labels: whether a class number means the same class in each task ("global"), or only within its task ("local").
            Tasks look the same either way. ``good_embedding`` makes use of it.

    Raises:
        ValueError: if a field is invalid; the message names the field, its value and what is allowed.
    """

    x_shape: DynamicShape
    x_dtype: Dtype = "float32"
    y: Literal["class", "real"] = "class"
    ways: Annotated[int, Ge(1)] | None = None
    y_shape: Shape = ()
    query_share: Annotated[float, Gt(0), Lt(1)] = 0.5
    labels: Literal["local", "global"] = "local"

    def __post_init__(self) -> None:
        """Validate the fields."""
        object.__setattr__(self, "x_shape", _shape("x_shape", self.x_shape, DYNAMIC))
        object.__setattr__(self, "y_shape", _shape("y_shape", self.y_shape))
        if self.x_dtype not in DTYPES:
            raise ValueError(f"x_dtype is {self.x_dtype!r}; it must be one of {', '.join(DTYPES)}")
        if self.y not in ("class", "real"):
            raise ValueError(f"y is {self.y!r}; it must be 'class' (labels) or 'real' (regression targets)")
        if self.labels not in ("local", "global"):
            raise ValueError(f"labels is {self.labels!r}; it must be 'local' or 'global'")
        if self.labels == "global" and self.y != "class":
            raise ValueError("labels is 'global', but y is 'real': only classes have labels; omit labels")
        if not 0 < self.query_share < 1:
            raise ValueError(f"query_share is {self.query_share}; it must lie between 0 and 1, both excluded")
        if self.y == "real" and self.ways is not None:
            raise ValueError(f"ways is {self.ways}, but y is 'real': omit ways, or set y = 'class'")
        if self.y == "class":
            if not _is_count(self.ways):
                raise ValueError(f"ways is {self.ways!r}; y = 'class' needs the number of classes, 1 or more")
            if self.y_shape != ():
                raise ValueError(f"y_shape is {self.y_shape}; a class label is a scalar, so it must be ()")


@dataclass(frozen=True)
class Limits:
    """Limits on the size of one arrival and on the number of waiting arrivals, which bound memory.

    Attributes:
        body_bytes: the size of the largest accepted body, in bytes.
        samples: the largest number of samples in one batch (support or query).
        elements: the largest number of elements in one tensor.
        expansion: the largest ratio of the decompressed to the compressed size of a body.
        body_seconds: how long a client may take to send one body.
        header_bytes: the largest size of a request's headers, and of its trailers, in bytes.
        header_seconds: how long a client may take to send the headers.
        keep_alive_seconds: how long a connection stays open without a request.
        connections: the largest number of open connections; each needs a file descriptor.
        id_length: the largest length of a task id, in characters.
        backlog: the largest number of rounds that wait to be learned before arrivals are held back.
        commit_batch: the largest number of arrivals in one commit.
        dead_letters: the largest number of rejected arrivals that are kept for inspection; 0 keeps none.
        dead_letter_bytes: their largest total size in bytes; 0 keeps none.

    Raises:
        ValueError: if a limit is not a whole number, or is below its minimum.
    """

    body_bytes: Annotated[int, Ge(1)] = 16 * 1024 * 1024
    samples: Annotated[int, Ge(1)] = 10_000
    elements: Annotated[int, Ge(1)] = 16 * 1024 * 1024
    expansion: Annotated[int, Ge(1)] = 200
    body_seconds: Annotated[int, Ge(1)] = 60
    header_bytes: Annotated[int, Ge(1)] = 64 * 1024
    header_seconds: Annotated[int, Ge(1)] = 10
    keep_alive_seconds: Annotated[int, Ge(1)] = 30
    connections: Annotated[int, Ge(1)] = 500
    id_length: Annotated[int, Ge(1)] = 200
    backlog: Annotated[int, Ge(1)] = 1_000
    commit_batch: Annotated[int, Ge(1)] = 64
    dead_letters: Annotated[int, Ge(0)] = 1_000
    dead_letter_bytes: Annotated[int, Ge(0)] = 256 * 1024 * 1024

    def __post_init__(self) -> None:
        """Validate the limits."""
        for name, value in vars(self).items():
            minimum = 0 if name.startswith("dead_letter") else 1
            if not _is_count(value, minimum):
                raise ValueError(f"{name} is {value!r}; it must be a whole number, {minimum} or more")


def require_same(given: TaskSpec, offered: TaskSpec, kind: str) -> None:
    """Check that a run expects the tasks that a source generates.

    Args:
        given: the tasks that the run expects.
        offered: the tasks that the source generates.
        kind: the kind of the source, for the error message.

    Raises:
        ValueError: if a field differs; the message names the first such field and both values.
    """
    for name in ("x_shape", "x_dtype", "y", "ways", "y_shape"):
        found, expected = getattr(given, name), getattr(offered, name)
        if found != expected and not (name == "x_shape" and fits(expected, found)):
            raise ValueError(
                f"the {kind!r} source generates tasks with {name} = {expected!r}, but the run expects {found!r}"
            )


def is_dynamic(shape: tuple[int, ...]) -> bool:
    """Return whether the shape has a dynamic dimension."""
    return DYNAMIC in shape


def fits(shape: tuple[int, ...], spec: tuple[int, ...]) -> bool:
    """Return whether a sample's shape matches ``spec``; a dynamic dimension matches any size of 1 or more."""
    pairs = zip(shape, spec, strict=False)
    return len(shape) == len(spec) and all(
        size == expected or (expected == DYNAMIC and size >= 1) for size, expected in pairs
    )


def _is_count(value: object, minimum: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _shape(name: str, value: object, allowed: int = 1) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or not all(_is_count(size) or (size == allowed) for size in value):
        any_size = f" ({allowed} for any size)" if allowed == DYNAMIC else ""
        expected = f"it must be whole numbers of 1 or more{any_size}, such as (3, 28, 28), or ()"
        raise ValueError(f"{name} is {value!r}; {expected}")
    return tuple(value)
