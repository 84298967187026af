"""What a run's tasks look like, and how much of them may come at once."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt

Dtype = Literal["uint8", "float16", "float32", "float64", "int64"]
"""The element types that a sample ``x`` may have."""

Shape = tuple[Annotated[int, Ge(1)], ...]
"""The shape of one sample, without the leading sample dimension; () is a scalar."""

DYNAMIC = -1
"""A dimension of any size from 1, which may differ from task to task."""

DynamicShape = tuple[Annotated[int, Ge(DYNAMIC)], ...]
"""A shape some of whose dimensions may be open."""

DTYPES = ("uint8", "float16", "float32", "float64", "int64")


@dataclass(frozen=True)
class TaskSpec:
    """The shape that every task of a run must have.

    Attributes:
        x_shape: the shape of one sample ``x``; a batch is (n, *x_shape). A dimension of -1 is open: any size from 1,
            the same in all samples of a task, another in another task. ``Limits.elements`` bounds it.
        x_dtype: the element type of ``x``, exactly as it must arrive.
        y: "class" (labels 0 .. ways-1) or "real" (regression targets, kept as float32).
        ways: how many classes there are; needed when ``y`` is "class", absent otherwise.
        y_shape: the shape of one sample's ``y``; () for "class".
        query_share: the share of the support that is held out as query when a task brings none, in (0, 1).

    Raises:
        ValueError: naming the field, what was found and what would be right.
    """

    x_shape: DynamicShape
    x_dtype: Dtype = "float32"
    y: Literal["class", "real"] = "class"
    ways: Annotated[int, Ge(1)] | None = None
    y_shape: Shape = ()
    query_share: Annotated[float, Gt(0), Lt(1)] = 0.5

    def __post_init__(self) -> None:
        """Refuse what cannot be a task."""
        object.__setattr__(self, "x_shape", _shape("x_shape", self.x_shape, DYNAMIC))
        object.__setattr__(self, "y_shape", _shape("y_shape", self.y_shape))
        if self.x_dtype not in DTYPES:
            raise ValueError(f"x_dtype is {self.x_dtype!r}; it must be one of {', '.join(DTYPES)}")
        if self.y not in ("class", "real"):
            raise ValueError(f"y is {self.y!r}; it must be 'class' (labels) or 'real' (regression targets)")
        if not 0 < self.query_share < 1:
            raise ValueError(f"query_share is {self.query_share}; it must lie between 0 and 1, both excluded")
        if self.y == "real" and self.ways is not None:
            raise ValueError(f"ways is {self.ways}, but y is 'real': leave ways out, or set y = 'class'")
        if self.y == "class":
            if not _is_count(self.ways):
                raise ValueError(f"ways is {self.ways!r}; y = 'class' needs the number of classes, 1 or more")
            if self.y_shape != ():
                raise ValueError(f"y_shape is {self.y_shape}; a class label is a scalar, so it must be ()")


@dataclass(frozen=True)
class Limits:
    """How much one arrival may hold and how much may wait; a bound on memory, not on what can be learned.

    Attributes:
        body_bytes: the largest body that is read, in bytes.
        samples: the most samples in one batch (support or query).
        elements: the most numbers in one tensor.
        expansion: how many times larger a compressed body may become when it is unpacked.
        body_seconds: how long a client may take to send one body.
        header_bytes: the most bytes of a request before its body, and behind it.
        header_seconds: how long a client may take to send them.
        keep_alive_seconds: how long a connection stays open without a request.
        connections: how many are open at once, each with a file descriptor.
        id_length: the longest task id, in characters.
        backlog: how many rounds may wait to be learned before arrivals are held back.
        commit_batch: the most arrivals made durable by one commit.
        dead_letters: how many rejected arrivals are kept to be looked at; 0 keeps none.
        dead_letter_bytes: how many bytes they take together at most; 0 keeps none.

    Raises:
        ValueError: if a limit is not a whole number, or is 0 where nothing could arrive.
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
        """Refuse limits under which nothing could arrive."""
        for name, value in vars(self).items():
            minimum = 0 if name.startswith("dead_letter") else 1
            if not _is_count(value, minimum):
                raise ValueError(f"{name} is {value!r}; it must be a whole number, {minimum} or more")


def require_same(given: TaskSpec, offered: TaskSpec, kind: str) -> None:
    """Refuse a run whose tasks are not those that a source of this ``kind`` makes.

    Raises:
        ValueError: naming the first field that differs, what it is and what it must be.
    """
    for name in ("x_shape", "x_dtype", "y", "ways", "y_shape"):
        found, expected = getattr(given, name), getattr(offered, name)
        if found != expected and not (name == "x_shape" and fits(expected, found)):
            raise ValueError(
                f"the {kind!r} source makes tasks with {name} = {expected!r}, but the run expects {found!r}"
            )


def is_dynamic(shape: tuple[int, ...]) -> bool:
    """Whether a dimension of the shape is open, so that it differs from task to task."""
    return DYNAMIC in shape


def fits(shape: tuple[int, ...], spec: tuple[int, ...]) -> bool:
    """Whether a sample of this shape is one that the ``spec`` allows: equal, any size from 1 where that is open."""
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
