"""Define the shape of a run's tasks and the limits on arrivals."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Literal, TypeVar, get_args

from annotated_types import Ge, Gt, Lt

Dtype = Literal["uint8", "float16", "float32", "float64", "int64"]
"""The dtypes of an input."""

Shape = tuple[Annotated[int, Ge(1)], ...]
"""The shape of one sample, without the leading sample dimension; () is a scalar."""

DYNAMIC = -1
"""A dynamic dimension: any size of 1 or more, which may differ between tasks."""

DynamicShape = tuple[Annotated[int, Ge(DYNAMIC)], ...]
"""A shape that may have dynamic dimensions."""

Values = Literal["numbers", "counts", "probabilities"]
"""What real targets are: any numbers; counts; or soft labels, the probabilities of the classes."""

Spec = TypeVar("Spec")

DTYPES = ("uint8", "float16", "float32", "float64", "int64")


IGNORED = -100
"""The class of an entry that no loss and no metric counts, where a sample has several, such as pixels or tokens."""

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
"""A name of an input or a target, which is also a keyword of the model."""

NAMES = 32
"""The largest number of named inputs, and of named targets."""


@dataclass(frozen=True)
class InputSpec:
    """One input of a model that takes several.

    Attributes:
        shape: the shape of one sample; a batch has shape (n, *shape). A dimension of -1 is dynamic: any size of 1 or
            more, equal for all samples of a task but possibly different between tasks.
        dtype: the dtype that the input must have on arrival.
        tokenizer: set it if the input may be texts: their token ids, as of ``[task.text]``. The shape is [length]
            and the dtype "int64".

    Raises:
        ValueError: if a field is invalid.
    """

    shape: DynamicShape
    dtype: Dtype = "float32"
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        """Validate the fields."""
        object.__setattr__(self, "shape", _shape("shape", self.shape, DYNAMIC))
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")
        if self.tokenizer is not None and (len(self.shape) != 1 or self.shape[0] < 1 or self.dtype != "int64"):
            raise ValueError(
                f"tokenizer gives token ids: set shape = [64], the tokens of a text, and dtype = 'int64', not "
                f"{list(self.shape)} and {self.dtype!r}"
            )


@dataclass(frozen=True)
class TargetSpec:
    """One target of a task that has several.

    Attributes:
        kind: "class" (classes 0 .. ways - 1) or "real" (numbers, stored as float32).
        ways: the number of classes; required if ``kind`` is "class", otherwise not allowed.
        shape: the shape of one sample's target. Of classes, () is one class for a sample, and a dimension may be
            dynamic (-1).
        values: what real targets must be: "numbers", any; "counts", whole numbers of 0 or more; "probabilities", soft
            labels, which are at least 0 and sum to 1 over the classes, the first dimension of ``shape``.

    Raises:
        ValueError: if a field is invalid.
    """

    kind: Literal["class", "real"] = "class"
    ways: Annotated[int, Ge(1)] | None = None
    shape: DynamicShape = ()
    values: Values = "numbers"

    def __post_init__(self) -> None:
        """Validate the fields."""
        _check_target("kind", self.kind, self.ways)
        object.__setattr__(self, "shape", _shape("shape", self.shape, DYNAMIC if self.kind == "class" else 1))
        _check_values("values", self.values, self.kind, self.shape)


@dataclass(frozen=True)
class TextSpec:
    """How texts become token ids: as JSON brings them, or a column of a file.

    Attributes:
        tokenizer: a folder with tokenizer.json, the name of an installed package that carries one, or an import path
            "package.module:name" of such a folder. Nothing is downloaded.
        length: tokens of a text; longer texts are cut, shorter ones padded. ``x_shape`` and ``x_dtype`` follow from it.

    Raises:
        ValueError: if a field is invalid.
    """

    tokenizer: str
    length: Annotated[int, Ge(1)] = 64

    def __post_init__(self) -> None:
        """Validate the fields."""
        if not _is_count(self.length):
            raise ValueError(f"length is {self.length!r}; it must be a whole number, 1 or more")


TOKEN_INPUTS = ("input_ids", "attention_mask")
"""The names under which a model may take the token ids of texts, and what of them is no padding."""


@dataclass(frozen=True)
class TaskSpec:
    """The shape and dtypes that every task of a run must have.

    Attributes:
        x_shape: the shape of one sample ``x``; a batch has shape (n, *x_shape). A dimension of -1 is dynamic: any size
            of 1 or more, equal for all samples of a task but possibly different between tasks. ``Limits.elements``
            bounds it. Required, unless the inputs have names.
        x_dtype: the dtype that ``x`` must have on arrival.
        y: "class" (labels 0 .. ways - 1) or "real" (regression targets, stored as float32).
        ways: the number of classes; required if ``y`` is "class", otherwise not allowed.
        y_shape: the shape of one sample's ``y``. Of classes, () is one label for a sample; with a shape, such as
            [28, 28], each entry has its class, a dimension may be dynamic (-1), and entries of class -100 do not count.
        y_values: what real targets must be, as ``values`` of ``[task.targets.NAME]``. If left out, it follows from
            ``[model] loss``: "counts" for poisson, "probabilities" for cross_entropy and categorical.
        query_share: the fraction of the support that is held out as the query set if a task has none, in (0, 1).
        labels: whether a class number means the same class in each task ("global"), or only within its task ("local").
            Tasks look the same either way. ``good_embedding`` makes use of it.
        x: the inputs of a model that takes several, by the keywords with which it is called: tables ``[task.x.NAME]``
            with a ``shape`` and a ``dtype``. ``x_shape`` and ``x_dtype`` are then left out.
        targets: the targets of a loss that compares several, by name: tables ``[task.targets.NAME]`` with a ``kind``,
            ``ways`` and a ``shape``. ``y``, ``ways`` and ``y_shape`` are then left out.
        text: set it if samples are texts: they are tokenized as they arrive. The input is then one tensor of token ids,
            or the named inputs ``input_ids`` and ``attention_mask``.

    Raises:
        ValueError: if a field is invalid; the message names the field, its value and what is allowed.
    """

    x_shape: DynamicShape | None = None
    x_dtype: Dtype = "float32"
    y: Literal["class", "real"] = "class"
    ways: Annotated[int, Ge(1)] | None = None
    y_shape: DynamicShape = ()
    y_values: Values = "numbers"
    query_share: Annotated[float, Gt(0), Lt(1)] = 0.5
    labels: Literal["local", "global"] = "local"
    x: Mapping[str, InputSpec] = field(default_factory=dict, hash=False)
    targets: Mapping[str, TargetSpec] = field(default_factory=dict, hash=False)
    text: TextSpec | None = None

    def __post_init__(self) -> None:
        """Validate the fields."""
        self._take_tokens()
        if self.x:
            object.__setattr__(self, "x", _named("x", self.x))
            if self.x_shape is not None or self.x_dtype != "float32":
                raise ValueError(f"x names the inputs {', '.join(self.x)}: leave out x_shape and x_dtype")
        elif self.x_shape is None:
            raise ValueError(
                "x_shape is missing, for example x_shape = [3, 28, 28], or a table [task.x.NAME] for each named input"
            )
        else:
            object.__setattr__(self, "x_shape", _shape("x_shape", self.x_shape, DYNAMIC))
        if self.x_dtype not in DTYPES:
            raise ValueError(f"x_dtype is {self.x_dtype!r}; it must be one of {', '.join(DTYPES)}")
        if self.labels not in ("local", "global"):
            raise ValueError(f"labels is {self.labels!r}; it must be 'local' or 'global'")
        if not 0 < self.query_share < 1:
            raise ValueError(f"query_share is {self.query_share}; it must lie between 0 and 1, both excluded")
        self._take_targets()
        if self.labels == "global" and self.y != "class":
            raise ValueError("labels is 'global', but y is 'real': only classes have labels; omit labels")

    def _take_targets(self) -> None:
        """Validate the target, or the named ones."""
        if not self.targets:
            _check_target("y", self.y, self.ways)
            object.__setattr__(self, "y_shape", _shape("y_shape", self.y_shape, DYNAMIC if self.y == "class" else 1))
            _check_values("y_values", self.y_values, self.y, self.y_shape)
            return
        object.__setattr__(self, "targets", _named("targets", self.targets))
        if self.ways is not None or self.y_shape != ():
            raise ValueError(f"targets names {', '.join(self.targets)}: leave out y, ways and y_shape")
        if self.y_values != "numbers":
            raise ValueError("y_values is for a single target: write values in [task.targets.NAME]")
        object.__setattr__(self, "y", "real")  # No code may take named targets for labels.

    def _take_tokens(self) -> None:
        """Set the input to the token ids of texts; raise ``ValueError`` if it is declared as another one."""
        text = self.text
        if text is None:
            return
        if self.x_shape is None and not self.x and self.x_dtype == "float32":
            object.__setattr__(self, "x_shape", (text.length,))
            object.__setattr__(self, "x_dtype", "int64")
        given = {name: (tuple(one.shape), one.dtype) for name, one in self.x.items()}
        given |= {} if self.x_shape is None else {"": (tuple(self.x_shape), self.x_dtype)}
        names = {"input_ids", *given} - {""} if self.x else {""}
        if not names <= {"", *TOKEN_INPUTS} or given != dict.fromkeys(names, ((text.length,), "int64")):
            raise ValueError(
                f"text gives token ids of shape [{text.length}] and dtype int64: leave out x_shape and x_dtype, or "
                "name the inputs input_ids and attention_mask with this shape and dtype"
            )

    def inputs(self) -> dict[str, InputSpec]:
        """Return the inputs by name, in the order of the names; a single tensor has the name ""."""
        return dict(self.x) if self.x_shape is None else {"": _input(self.x_shape, self.x_dtype)}

    def text_of(self, name: str) -> TextSpec | None:
        """Return how texts become the input ``name``; None if it takes no texts."""
        if self.text is not None:
            return self.text
        given = self.inputs()[name]
        return None if given.tokenizer is None else TextSpec(given.tokenizer, given.shape[0])

    def list_texts(self) -> list[str]:
        """Return the names under which texts may arrive: "" for ``text``, otherwise inputs with a tokenizer."""
        return [""] if self.text is not None else [name for name, one in self.x.items() if one.tokenizer is not None]

    def list_targets(self) -> dict[str, TargetSpec]:
        """Return the targets by name, in the order of the names; a single tensor has the name ""."""
        return dict(self.targets) or {"": _target(self.y, self.ways, self.y_shape, self.y_values)}

    def has_open_dimensions(self) -> bool:
        """Return whether the size of a task's samples may differ between tasks."""
        shapes = [one.shape for one in self.inputs().values()] + [one.shape for one in self.list_targets().values()]
        return any(map(is_dynamic, shapes))

    def require_single_input(self, what: str) -> tuple[int, ...]:
        """Return ``x_shape``; raise ``ValueError`` that says that ``what`` takes no named inputs."""
        if self.x_shape is None or self.targets:
            raise ValueError(f"{what} takes tasks of one tensor x and one tensor y, not named inputs or targets")
        return self.x_shape


@dataclass(frozen=True)
class Limits:
    """Limits on the size of one arrival and on the number of waiting arrivals, which bound memory.

    Attributes:
        body_bytes: the size of the largest accepted body, in bytes.
        json_bytes: the size of the largest accepted body in JSON, in bytes. Numbers in JSON take up to 40 times their
            size in memory while they are read.
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
        kept_predictions: the largest number of kept predictions that wait for their labels.
        kept_prediction_bytes: their largest total size in bytes.
        kept_prediction_days: after how many days one of them is dropped, when the next prediction is kept.

    Raises:
        ValueError: if a limit is not a whole number, or is below its minimum.
    """

    body_bytes: Annotated[int, Ge(1)] = 16 * 1024 * 1024
    json_bytes: Annotated[int, Ge(1)] = 2 * 1024 * 1024
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
    kept_predictions: Annotated[int, Ge(1)] = 10_000
    kept_prediction_bytes: Annotated[int, Ge(1)] = 256 * 1024 * 1024
    kept_prediction_days: Annotated[int, Ge(1)] = 90

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
    for name in ("x_shape", "x_dtype", "y", "ways", "y_shape", "x", "targets"):
        found, expected = getattr(given, name), getattr(offered, name)
        open_size = name == "x_shape" and found is not None and expected is not None and fits(expected, found)
        if found != expected and not open_size:
            raise ValueError(
                f"the {kind!r} source generates tasks with {name} = {expected!r}, but the run expects {found!r}"
            )


def is_dynamic(shape: tuple[int, ...]) -> bool:
    """Return whether the shape has a dynamic dimension."""
    return DYNAMIC in shape


def join_name(part: str, name: str) -> str:
    """Return the name of a tensor on the wire: "support_x" for "support_x" and "", "support_x.NAME" with a name."""
    return f"{part}.{name}" if name else part


def fits(shape: tuple[int, ...], spec: tuple[int, ...]) -> bool:
    """Return whether a sample's shape matches ``spec``; a dynamic dimension matches any size of 1 or more."""
    pairs = zip(shape, spec, strict=False)
    return len(shape) == len(spec) and all(
        size == expected or (expected == DYNAMIC and size >= 1) for size, expected in pairs
    )


def _check_target(what: str, kind: str, ways: object) -> None:
    if kind not in ("class", "real"):
        raise ValueError(f"{what} is {kind!r}; it must be 'class' (labels) or 'real' (regression targets)")
    if kind == "real" and ways is not None:
        raise ValueError(f"ways is {ways}, but {what} is 'real': omit ways, or set {what} = 'class'")
    if kind == "class" and not _is_count(ways):
        raise ValueError(f"ways is {ways!r}; {what} = 'class' needs the number of classes, 1 or more")


def _check_values(what: str, values: str, kind: str, shape: tuple[int, ...]) -> None:
    if values not in get_args(Values):
        raise ValueError(f"{what} is {values!r}; it must be one of {', '.join(get_args(Values))}")
    if values != "numbers" and kind != "real":
        raise ValueError(f"{what} is {values!r}, which real targets may be, but the target is a class: omit it")
    if values == "probabilities" and not shape:
        raise ValueError(f"{what} is 'probabilities', but a target is one number: its shape begins with the classes")


def _named(what: str, given: Mapping[str, Spec]) -> dict[str, Spec]:
    """Return a copy in the order of the names, which is that of the tensors of all tasks."""
    for name in given:
        if not NAME.fullmatch(name):
            raise ValueError(f"{what} has the name {name!r}; it must be letters, digits and _, such as tokens")
    if len(given) > NAMES:
        raise ValueError(f"{what} has {len(given)} names; at most {NAMES} are accepted")
    return dict(sorted(given.items()))


_input, _target = cache(InputSpec), cache(TargetSpec)
"""They are asked for several times a task, and validate what they are given."""


def _is_count(value: object, minimum: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _shape(name: str, value: object, allowed: int = 1) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or not all(_is_count(size) or (size == allowed) for size in value):
        if name == "y_shape" and isinstance(value, tuple | list):
            for at, size in enumerate(value):
                if isinstance(size, int) and size < 1 and size != allowed:
                    raise ValueError(f"{name}[{at}] = {size!r}: must be at least 1")
        any_size = f" ({allowed} for any size)" if allowed == DYNAMIC else ""
        expected = f"it must be whole numbers of 1 or more{any_size}, such as (3, 28, 28), or ()"
        raise ValueError(f"{name} is {value!r}; {expected}")
    return tuple(value)
