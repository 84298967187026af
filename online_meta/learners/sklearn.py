"""Any estimator of scikit-learn, or of another library with its interface, fitted to tasks and to past rows."""

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Gt, Lt

from online_meta.learners import LearnerContext, PredictingLearner, TaskShape
from online_meta.learners._fitted import (
    FitRows,
    FittingLearner,
    Predict,
    Scope,
    Values,
    check_libraries,
    find_libraries,
    load_estimator,
    require_methods,
)
from online_meta.learners._targets import CLASSES, MEANS, find_outputs, fits_rows

META_LEARNS = False

OF_NUMBERS, OF_CLASSES = "sklearn.linear_model:RidgeCV", "sklearn.linear_model:LogisticRegression"
"""What is fitted by default."""


def can_answer(tasks: TaskShape) -> bool:
    """Return whether the default estimators can answer such tasks."""
    return fits_rows(tasks, {*CLASSES, *MEANS})


def find_versions(options: Mapping[str, Any]) -> dict[str, str]:
    """Return the versions of the libraries on which a run with these options depends."""
    own = options.get("estimator") or OF_NUMBERS
    return {
        **find_libraries(OF_NUMBERS, {"sklearn": "scikit-learn"}),
        **find_libraries(own, {"sklearn": "scikit-learn"}),
    }


def build(
    context: LearnerContext,
    estimator: str | None = None,
    estimator_options: Mapping[str, Any] | None = None,
    scope: Scope = "task",
    reservoir: Annotated[int, Ge(1)] = 1000,
    smoothing: Annotated[float, Gt(0), Lt(1)] = 0.01,
    libraries: Mapping[str, str] | None = None,
) -> PredictingLearner:
    """Create the learner that answers by an estimator of scikit-learn (Pedregosa et al., JMLR 2011).

    The estimator has ``fit`` and ``predict``, or for classes ``predict_proba``, of flattened inputs (n, d) in float64.
    Each output has an estimator of its own. A fit has one thread, and the random state is a function of the run's seed
    and the round. The state of the learner is rows: a model is fitted again, from the same rows, after a restart and in
    the process that serves. The model of past rows is fitted once a round.

    An estimator that cannot be fitted, as to too few rows, or that predicts what is not finite, answers by the mean or
    the shares of the targets, which is logged once; without any rows, it answers 0 or equal shares. A class without
    rows has the probability 1 / (n + C).

    Args:
        context: what all learners share.
        estimator: the import path of its class, such as "sklearn.neighbors:KNeighborsRegressor". By default, ridge
            regression with a cross-validated penalty, or logistic regression for classes.
        estimator_options: the arguments of the class.
        scope: the rows of a fit. "task": the support set. "pooled": a reservoir of the rows of all rounds so far,
            whatever the support set. "both": the reservoir and the support set.
        reservoir: the number of past rows that are kept and published, drawn uniformly from all of them.
        smoothing: the share of equal probabilities in those of classes, so that each is above 0.
        libraries: the versions with which the run was begun, by the name of the module. The run records them.

    Raises:
        ValueError: if the estimator cannot be imported or made, has no ``predict``, or is of the wrong kind, if the
            libraries have other versions, or if the outcome is not cross_entropy, categorical, mse or
            gaussian_of_noise.
    """
    outputs = find_outputs(context, "sklearn")
    path = estimator or (OF_CLASSES if outputs.of_classes else OF_NUMBERS)
    check_libraries(libraries, find_versions({"estimator": path}))
    kind, options = load_estimator(path, "sklearn"), dict(estimator_options or {})
    _check_kind(path, _make(path, kind, options, 0), of_classes=outputs.of_classes)
    one_thread = _find_thread_limits()

    def fit(rows: FitRows, seed: int) -> Predict:
        columns = [rows.targets] if rows.classes else [*rows.targets.T]
        with one_thread(), np.errstate(all="ignore"):
            fitted = [_fit_one(_make(path, kind, options, seed), path, rows, column) for column in columns]

        def predict(x: Values) -> Values:
            with one_thread(), np.errstate(all="ignore"):
                if rows.classes:
                    return _probabilities_of(fitted[0], x, rows)
                return np.stack([np.asarray(one.predict(x), np.float64).reshape(len(x)) for one in fitted], 1)

        return predict

    return FittingLearner(context, outputs, fit, scope, reservoir, smoothing=smoothing, order_matters=True)


def _make(path: str, kind: Callable[..., Any], options: Mapping[str, Any], seed: int) -> Any:
    """Return an estimator with its random states, and one job, where its arguments name them."""
    try:
        made = kind(**options)
        if not hasattr(made, "get_params"):
            known = inspect.signature(kind).parameters
            own = {"random_state": seed, "n_jobs": 1}
            return kind(**{**{name: value for name, value in own.items() if name in known}, **options})
    except TypeError as error:
        raise ValueError(f"estimator_options {dict(options)} do not fit {path}: {error}") from error
    params = made.get_params(deep=True)
    own = {name: seed for name, value in params.items() if value is None and name.rpartition("__")[2] == "random_state"}
    for name in params:
        owner, _, last = name.rpartition("__")
        foreign = not type(params.get(owner, made)).__module__.startswith(
            "sklearn."
        )  # There, no number of jobs is one.
        if last == "n_jobs" and foreign and name not in options:
            own[name] = 1
    return made.set_params(**own)


def _check_kind(path: str, made: Any, *, of_classes: bool) -> None:
    """Raise ``ValueError`` if an estimator has wrong arguments, no method to predict, or predicts something else."""
    require_methods(path, made, ["fit"], ["predict_proba", "predict"] if of_classes else ["predict"])
    if hasattr(made, "_validate_params"):
        try:
            made._validate_params()
        except ValueError as error:
            raise ValueError(f"estimator_options of {path}: {error}") from error
    own = _kind_of(made)
    wanted = "classifier" if of_classes else "regressor"
    if own in ("classifier", "regressor") and own != wanted:
        raise ValueError(f"estimator = {path!r} is a {own}: the targets of this run need a {wanted}")


def _kind_of(made: Any) -> str | None:
    """Return "classifier" or "regressor"; None for others, and for those of other libraries that do not say it."""
    tags = getattr(made, "__sklearn_tags__", None)
    found = getattr(tags(), "estimator_type", None) if tags is not None else getattr(made, "_estimator_type", None)
    return found if found is None else str(found)


def _fit_one(made: Any, path: str, rows: FitRows, targets: Any) -> Any:
    """Return the estimator, fitted to the rows, whose weights it takes unless all are alike."""
    if (rows.weight == rows.weight[0]).all():
        return made.fit(rows.inputs, targets)
    if "sample_weight" not in inspect.signature(made.fit).parameters:
        raise TypeError(f"the fit of {path} takes no sample_weight, and the samples of this task have weights")
    return made.fit(rows.inputs, targets, sample_weight=rows.weight)


def _probabilities_of(fitted: Any, x: Values, rows: FitRows) -> Values:
    """Return the probabilities (m, C). Of an estimator that has none, its label counts as if n samples had it."""
    found = np.zeros((len(x), rows.classes))
    if hasattr(fitted, "predict_proba"):
        found[:, np.asarray(fitted.classes_, np.int64)] = fitted.predict_proba(x)
        return found
    found[np.arange(len(x)), np.asarray(fitted.predict(x)).astype(np.int64)] = 1.0
    present, count = np.unique(rows.targets), rows.weight.sum()
    found[:, present] = (count * found[:, present] + 1) / (count + len(present))
    return found


def _find_thread_limits() -> Callable[[], AbstractContextManager[Any]]:
    """Let the linear algebra of NumPy and SciPy have one thread in this process; return the context of a fit.

    The former belongs to the process: threads that set and restore it would undo each other. OpenMP counts for each
    thread by itself.
    """
    try:
        import threadpoolctl  # type: ignore[import-untyped]
    except ImportError:
        return nullcontext
    pools = threadpoolctl.ThreadpoolController()
    pools.select(user_api="blas").limit(limits=1)
    own = pools.select(user_api="openmp")
    return lambda: own.limit(limits=1)
