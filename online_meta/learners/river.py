"""Any model of river, which learns single rows, on past rows and those of a task in their order."""

import inspect
from collections.abc import Callable, Mapping, Sequence
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

OF_NUMBERS, OF_CLASSES = "river.linear_model:LinearRegression", "river.tree:HoeffdingTreeClassifier"
"""What learns by default."""

SCALER = "river.preprocessing:StandardScaler"


def can_answer(tasks: TaskShape) -> bool:
    """Return whether the default models can answer such tasks."""
    return fits_rows(tasks, {*CLASSES, *MEANS})


def find_versions(options: Mapping[str, Any]) -> dict[str, str]:
    """Return the versions of the libraries on which a run with these options depends."""
    paths = OF_NUMBERS, options.get("estimator") or OF_NUMBERS
    return {name: one for path in paths for name, one in find_libraries(path, {}).items()}


def build(
    context: LearnerContext,
    estimator: str | None = None,
    estimator_options: Mapping[str, Any] | None = None,
    scope: Scope = "both",
    reservoir: Annotated[int, Ge(1)] = 100,
    scale: bool = True,
    smoothing: Annotated[float, Gt(0), Lt(1)] = 0.01,
    libraries: Mapping[str, str] | None = None,
) -> PredictingLearner:
    """Create the learner that answers by a model of river (Montiel et al., JMLR 2021).

    The model has ``learn_one`` and ``predict_one``, or for classes ``predict_proba_one``, of rows {0: x_0, 1: x_1, ...}
    of the flattened inputs. Each output has a model of its own. Its seed is a function of the run's seed and the round.

    The model is never saved. The state of the learner is a reservoir of past rows, drawn uniformly from all of them,
    and a new model learns these in the order in which they arrived, and then the support set, for each answer. So it
    forgets what left the reservoir, it sees changes of the stream only as far as the rows that were kept show them, and
    an answer costs the time to learn ``reservoir`` rows, some 10 microseconds for each number in them.

    A model that fails, or that predicts what is not finite, answers by the mean or the shares of the targets, which is
    logged once; without any rows, it answers 0 or equal shares. A class without rows has the probability 1 / (n + C).

    Args:
        context: what all learners share.
        estimator: the import path of its class, such as "river.tree:HoeffdingTreeRegressor". By default, linear
            regression by stochastic gradient descent, or a Hoeffding tree for classes.
        estimator_options: the arguments of the class.
        scope: the rows that are learned. "task": the support set. "pooled": the reservoir of the rows of all rounds so
            far, once a round. "both": the reservoir, and then the support set.
        reservoir: the number of past rows that are kept and published.
        scale: whether the inputs are standardised by running means and variances.
        smoothing: the share of equal probabilities in those of classes, so that each is above 0.
        libraries: the versions with which the run was begun, by the name of the module. The run records them.

    Raises:
        ValueError: if the model cannot be imported or made, or lacks a method, if the libraries have other versions, or
            if the outcome is not cross_entropy, categorical, mse or gaussian_of_noise.
    """
    outputs = find_outputs(context, "river")
    path = estimator or (OF_CLASSES if outputs.of_classes else OF_NUMBERS)
    check_libraries(libraries, find_versions({"estimator": path}))
    kind, options = load_estimator(path, "river"), dict(estimator_options or {})
    scaler = load_estimator(SCALER, "river") if scale else None
    predictions = ["predict_proba_one"] if outputs.of_classes else ["predict_one"]
    require_methods(path, _make(path, kind, options, 0), ["learn_one"], predictions)

    def make(seed: int) -> Any:
        model = _make(path, kind, options, seed)
        return model if scaler is None else scaler() | model

    def fit(rows: FitRows, seed: int) -> Predict:
        if (rows.weight != rows.weight[0]).any():
            raise TypeError(f"{path} learns rows without weights, and the samples of this task have weights")
        return fit_in_order([make(seed) for _ in range(1 if rows.classes else rows.targets.shape[1])], rows)

    return FittingLearner(context, outputs, fit, scope, reservoir, smoothing=smoothing, order_matters=True)


def fit_in_order(models: Sequence[Any], rows: FitRows) -> Predict:
    """Let one model of the classes, or a model of each output, learn the rows one after the other."""
    columns = [rows.targets] if rows.classes else [*rows.targets.T]
    with np.errstate(all="ignore"):
        for model, column in zip(models, columns, strict=True):
            for x, y in zip(_to_dicts(rows.inputs), column.tolist(), strict=True):
                model.learn_one(x, y)

    def predict(x: Values) -> Values:
        each = _to_dicts(x)
        with np.errstate(all="ignore"):
            if rows.classes:
                return np.array([_probabilities_of(models[0].predict_proba_one(one), rows) for one in each])
            return np.array([[float(model.predict_one(one)) for model in models] for one in each])

    return predict


def _make(path: str, kind: Callable[..., Any], options: Mapping[str, Any], seed: int) -> Any:
    """Return a new model with its seed, if its class has one."""
    try:
        seeds = {"seed": seed} if "seed" in inspect.signature(kind).parameters else {}
        return kind(**{**seeds, **options})
    except (TypeError, ValueError) as error:
        raise ValueError(f"estimator_options {dict(options)} do not fit {path}: {error}") from error


def _to_dicts(inputs: Values) -> list[dict[int, float]]:
    return [dict(enumerate(row)) for row in inputs.tolist()]


def _probabilities_of(found: Mapping[int, float], rows: FitRows) -> Values:
    """Return the probabilities (C,) in a dict; where it says nothing, the shares of the classes."""
    shares = np.array([max(float(found.get(label, 0.0)), 0.0) for label in range(rows.classes)])
    if not shares.sum() > 0:
        shares = np.bincount(rows.targets, rows.weight, rows.classes)
    normalised: Values = shares / shares.sum()
    return normalised
