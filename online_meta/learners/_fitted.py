"""Learners that fit a model of another library to rows: to those of a task, and to a reservoir of past ones.

What such a learner keeps and publishes are rows. A fitted model is never saved: it is fitted again, from the same rows
with the same seed.
"""

import importlib
import logging
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from threading import Lock
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from online_meta.batches import concat_support_query
from online_meta.learners import LearnerContext
from online_meta.learners._online_step import PredictingLearner
from online_meta.learners._targets import Outputs, find_rows, flatten_inputs
from online_meta.registry import import_by_path
from online_meta.replay import generator
from online_meta.types import Batch, Prediction, State, Task, Tensors

Scope = Literal["task", "pooled", "both"]

RESERVOIR_STREAM, FIT_STREAM = 1701, 1702
"""They separate the random draws of a reservoir and of a fit from others with the same seed."""

Values = NDArray[np.float64]

log = logging.getLogger(__name__)


class FitRows(NamedTuple):
    """The samples that a model is fitted to, in the order of arrival.

    Attributes:
        inputs: (n, d).
        targets: numbers (n, k), or classes (n,) int64.
        weight: (n,), above 0.
        classes: how many there are; 0 for numbers.
    """

    inputs: Values
    targets: NDArray[Any]
    weight: Values
    classes: int


Predict = Callable[[Values], Values]
"""Inputs (m, d) -> the expected targets (m, k), or probabilities (m, classes), 0 for a class without samples."""

Fit = Callable[[FitRows, int], Predict]
"""(rows, a seed) -> the fitted model."""


class FittingLearner(PredictingLearner):
    """A learner that answers by a model which is fitted to rows."""

    def __init__(
        self,
        context: LearnerContext,
        outputs: Outputs,
        fit: Fit,
        scope: Scope,
        size: int,
        *,
        smoothing: float,
        order_matters: bool = False,
    ) -> None:
        """Start without rows.

        Args:
            context: what all learners share.
            outputs: what the run's outputs mean.
            fit: fits a model to rows. A ``ValueError`` or ``ArithmeticError`` says that it cannot be fitted to these.
            scope: the rows. "task": those of the support set; "pooled": the reservoir of the rounds so far; "both": the
                reservoir, and then the support set.
            size: how many rows the reservoir holds.
            smoothing: the share of equal probabilities in those of classes.
            order_matters: whether a fit depends on the order of the rows.
        """
        super().__init__({}, self._answer_by_fit, self._add_rows, order_matters=order_matters)
        self._context, self._outputs, self._fit = context, outputs, fit
        self._scope, self._size, self._smoothing = scope, size, smoothing
        self._lock, self._fits, self._failed = Lock(), list[tuple[State, Predict]](), False
        self.prepare = self._fit_past_rows if scope == "pooled" else None

    def _fit_past_rows(self, state: State) -> None:
        """Fit the model of past rows, so that answers from ``state`` need not."""
        if state:
            self._find_pooled(state)

    def _answer_by_fit(self, state: State, support: Batch, x: Tensors) -> Prediction:
        like, inputs = self._outputs.sample(x), flatten_inputs(x)
        if self._scope == "pooled":
            predict = self._find_pooled(state) if state else None
        else:
            rows = find_rows(support, self._outputs, like)
            if self._scope == "both" and state:
                old = (one.to(inputs.device).double() for one in read_rows(state))
                rows = tuple(torch.cat(parts) for parts in zip(old, rows, strict=True))  # type: ignore[assignment]
            predict = self._fit_rows(rows, state)
        found = inputs.new_zeros(len(inputs), like.numel())
        if predict is not None:
            found = torch.from_numpy(predict(inputs.cpu().numpy())).to(found)
        return self._outputs.predict(found.reshape(len(inputs), *like.shape).to(like.dtype))

    def _add_rows(self, state: State, task: Task, round: int) -> State:
        rounds = torch.tensor(round + 1, dtype=torch.float64)
        if self._scope == "task":
            return {"rounds": rounds}
        both, like = concat_support_query(task), self._outputs.sample(task.query.x)
        rows = find_rows(both, self._outputs, like)
        if not state:
            dtype = torch.float64 if torch.float64 in _dtypes(both.x) else torch.float32
            state = make_reservoir(self._size, rows[0].shape[1], like.numel(), dtype)
        return {**fill_reservoir(state, rows, self._context.seed, round), "rounds": rounds}

    def _find_pooled(self, state: State) -> Predict | None:
        with self._lock:
            for known, found in self._fits:
                if known is state or all(_is_same(known[name], state[name]) for name in state):
                    return found
        predict = self._fit_rows(tuple(one.double() for one in read_rows(state)), state)
        if predict is not None:
            with self._lock:  # The one before still serves while this one is fitted for later requests.
                self._fits = [*self._fits[-1:], (state, predict)]
        return predict

    def _fit_rows(self, rows: tuple[Tensor, ...], state: State) -> Predict | None:
        """Return the model fitted to rows, or the mean or the shares of the targets if it cannot be; None without."""
        classes = rows[1].shape[1] if self._outputs.of_classes else 0
        given = _to_fit_rows(rows, classes)
        if not len(given.weight):
            return None
        constant = fit_constant(given)
        round = int(state["rounds"]) if state else 0
        if classes and len(np.unique(given.targets)) == 1:
            return constant
        try:
            predict = self._fit(given, int(generator(self._context.seed, round, FIT_STREAM).integers(2**31)))
        except (ValueError, ArithmeticError) as error:
            self._note_failure(given, f"{type(error).__name__}: {error}")
            return constant

        def answer(x: Values) -> Values:
            try:
                found = predict(x)
            except (ValueError, ArithmeticError) as error:
                self._note_failure(given, f"{type(error).__name__}: {error}")
                return constant(x)
            if not np.isfinite(found).all():
                self._note_failure(given, "its predictions are not finite")
                return constant(x)
            return smooth(found, given, self._smoothing) if classes else found

        return answer

    def _note_failure(self, rows: FitRows, reason: str) -> None:
        if not self._failed:
            log.warning(
                "a model cannot be fitted to %d rows, so the mean or the shares of their targets answer, as in other "
                "such cases to come: %s",
                len(rows.weight),
                reason,
            )
        self._failed = True


def fit_constant(rows: FitRows) -> Predict:
    """Return the mean of the targets, or log((n_c + 1) / (n + C)) of C classes."""
    if not rows.classes:
        mean = rows.weight @ rows.targets / rows.weight.sum()
        return lambda x: np.broadcast_to(mean, (len(x), len(mean))).copy()
    counts = np.bincount(rows.targets, rows.weight, rows.classes)
    shares = np.log((counts + 1) / (counts.sum() + rows.classes))
    return lambda x: np.broadcast_to(shares, (len(x), rows.classes)).copy()


def smooth(probabilities: Values, rows: FitRows, share: float) -> Values:
    """Return the logarithm of probabilities (m, C) that are all above 0.

    Each class without samples gets 1 / (n + C), as from Laplace's rule of succession, and the others the rest. Then
    p_c = (1 - share) p_c + share / C.
    """
    counts = np.bincount(rows.targets, rows.weight, rows.classes)
    missing, least = counts == 0, 1 / (counts.sum() + rows.classes)
    found = probabilities * (1 - missing.sum() * least) + missing * least
    logs: Values = np.log((1 - share) * found + share / rows.classes)
    return logs


def make_reservoir(size: int, inputs: int, targets: int, dtype: torch.dtype) -> State:
    """Return an empty reservoir of ``size`` rows. ``arrived`` (size,) numbers them in their order; -1 is no row."""
    return {
        "inputs": torch.zeros(size, inputs, dtype=dtype),
        "targets": torch.zeros(size, targets, dtype=torch.float64),
        "weight": torch.zeros(size, dtype=torch.float64),
        "arrived": torch.full((size,), -1.0, dtype=torch.float64),
        "seen": torch.zeros((), dtype=torch.float64),
    }


def fill_reservoir(state: State, rows: tuple[Tensor, ...], seed: int, round: int) -> State:
    """Return the reservoir after some more rows: a uniform sample of all rows so far (Vitter's algorithm R, 1985).

    The draws are a function of the seed and the round.
    """
    names = ("inputs", "targets", "weight", "arrived")
    parts = {name: state[name].cpu().clone() for name in names}
    size, seen = len(parts["weight"]), int(state["seen"])
    arrived = torch.arange(seen, seen + len(rows[0]), dtype=torch.float64)
    counts = arrived.numpy().astype(np.int64)
    draws = generator(seed, round, RESERVOIR_STREAM).integers(counts + 1)
    places = np.where(counts < size, counts, draws)
    kept = {int(place): row for row, place in enumerate(places) if place < size}  # The last one wins.
    for name, new in zip(names, (*rows, arrived), strict=True):
        parts[name][[*kept]] = new.cpu()[[*kept.values()]].to(parts[name])
    return {**parts, "seen": torch.tensor(seen + len(counts), dtype=torch.float64)}


def read_rows(state: State) -> tuple[Tensor, Tensor, Tensor]:
    """Return the inputs, the targets and the weights of a reservoir in the order in which they arrived."""
    arrived = state["arrived"]
    order = arrived.argsort()[int((arrived < 0).sum()) :]
    return state["inputs"][order], state["targets"][order], state["weight"][order]


def load_estimator(path: str, package: str) -> Callable[..., Any]:
    """Return the class that an import path names.

    Args:
        path: such as "sklearn.linear_model:RidgeCV".
        package: the extra of online-meta that brings such classes, such as "sklearn".

    Raises:
        ValueError: if it cannot be imported; the message names the package to install, or the wrong part of the path.
    """
    try:
        found: Any = import_by_path(path)
    except ValueError as error:
        missing = error.__cause__.name if isinstance(error.__cause__, ModuleNotFoundError) else None
        if missing is not None and missing == path.partition(":")[0].partition(".")[0]:
            how = (
                f"pip install 'online-meta[{package}]'" if missing == package else f"install the package of {missing!r}"
            )
            raise ValueError(f"estimator = {path!r}: the module {missing!r} is not installed: {how}") from error
        raise ValueError(f"estimator = {error}") from error
    if not callable(found):
        raise ValueError(f"estimator = {path!r} is a {type(found).__name__}: it is to be a class of estimators")
    return found  # type: ignore[no-any-return]


def require_methods(path: str, estimator: Any, needed: Collection[str], choices: Collection[str]) -> None:
    """Raise ``ValueError`` unless an estimator has all ``needed`` methods and one of the ``choices``."""
    missing = [name for name in needed if not hasattr(estimator, name)]
    if missing or not any(hasattr(estimator, name) for name in choices):
        wanted = missing or [" or ".join(choices)]
        raise ValueError(f"estimator = {path!r} has no method {' and no '.join(wanted)}: choose another class")


def find_libraries(path: str, distributions: Mapping[str, str]) -> dict[str, str]:
    """Return the version of the library of an import path, by the name of its module.

    ``distributions`` has the names of packages whose modules have another name.
    """
    module = path.partition(":")[0].partition(".")[0]
    try:
        return {module: version(distributions.get(module, module))}
    except PackageNotFoundError:
        pass
    try:
        return {module: str(getattr(importlib.import_module(module), "__version__", "unknown"))}
    except ImportError:
        return {module: "not installed"}


def check_libraries(recorded: Mapping[str, str] | None, found: Mapping[str, str]) -> None:
    """Raise ``ValueError`` if libraries have other versions than the ones recorded, with which fits may differ."""
    for name, before in (recorded or {}).items():
        now = found.get(name, "not installed")
        if now != before:
            raise ValueError(
                f"the models were fitted by {name} {before}, and {name} {now} is here, which may fit others: install "
                f"{name} {before}, or begin another run"
            )


def _to_fit_rows(rows: tuple[Tensor, ...], classes: int) -> FitRows:
    inputs, targets, weight = (one.cpu().numpy() for one in rows)
    if not classes:
        return FitRows(inputs, targets, weight, 0)
    row, label = targets.nonzero()
    return FitRows(inputs[row], label, weight[row] * targets[row, label], classes)


def _is_same(first: Tensor, second: Tensor) -> bool:
    return first is second or torch.equal(first, second)


def _dtypes(x: Tensors) -> set[torch.dtype]:
    return {x.dtype} if isinstance(x, Tensor) else {one.dtype for one in x.values()}
