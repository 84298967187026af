"""The exact Bayes predictor of the run's source: regret against it is nats above what any answer could lose."""

import dataclasses
import json
import zlib
from collections.abc import Callable
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

import streams.sources
from online_meta import registry
from online_meta.functional.model import ModelLoss
from online_meta.learners import LearnerContext
from online_meta.prediction import loss_of
from online_meta.regret.ledger import Comparator, is_finite_loss
from online_meta.types import Params, Task
from streams.sources import Oracle
from trainers.comparators import ComparatorUnavailable, RefreshRequest, RefreshResult, always_continue
from trainers.comparators._sampling import list_unread_rounds
from trainers.settings import RegretSettings

EXACT = True
STANDS_FOR = "the exact Bayes predictor of the source"
EXAMPLE_OPTIONS = {
    "source": "linear_gaussian",
    "options": {"mean": [0.0, 0.0, 0.0], "covariance": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]},
}
"""Options for tasks with two numbers in x."""
PLACE = "[regret.comparator_options.bayes]"


def check(context: LearnerContext, task: Task, source: str = "", options: dict[str, Any] | None = None) -> None:
    """Raise ``ValueError`` if the source has no exact answer to such a task, or the run's loss is not in nats."""
    predict = load_oracle(source, options)
    loss = context.inner.loss
    if not isinstance(loss, ModelLoss) or loss.outcome.cdf is None:
        raise ValueError(
            "the loss of an exact Bayes predictor is a negative log-likelihood in nats, and that of the run is not: "
            "use [model] loss = 'gaussian' or 'gaussian_of_noise'"
        )
    predict(task.support, task.query.x)


def load_oracle(source: str, options: dict[str, Any] | None = None) -> Oracle:
    """Return the exact Bayes predictor of a source.

    Args:
        source: the kind of the source.
        options: those of the source that are not its defaults.

    Raises:
        ValueError: if there is no such source, it has no exact answers, or the options do not fit.
    """
    if not source:
        raise ValueError(
            "the run has several sources or none, so that it is not known whose exact answers count: set source in "
            f"{PLACE}, one of {_list_kinds()}"
        )
    module = registry.load_module(streams.sources, source)
    if not hasattr(module, "oracle"):
        raise ValueError(
            f"source = {source!r} in {PLACE} has no exact answers; those that have them are {_list_kinds()}"
        )
    known = [field.name for field in dataclasses.fields(module.Settings)]
    for name in options or {}:
        if name not in known:
            raise ValueError(f"options of {PLACE} have no key {name!r}: {registry.nearest(name, known)}")
    try:
        settings = TypeAdapter(module.Settings).validate_json(json.dumps(options or {}), strict=True)
    except ValidationError as error:
        place, message = error.errors()[0]["loc"], error.errors()[0]["msg"]
        raise ValueError(f"options of {PLACE}: {'.'.join(map(str, place))}: {message}") from error
    found: Oracle = module.oracle(settings)
    return found


def _list_kinds() -> str:
    """Return the kinds of sources that have exact answers, as text."""
    kinds = registry.file_names(streams.sources)
    return ", ".join(kind for kind in kinds if hasattr(registry.load_module(streams.sources, kind), "oracle"))


def refresh(
    context: LearnerContext,
    regret: RegretSettings,
    request: RefreshRequest,
    saved: Params | None,
    should_continue: Callable[[], bool] = always_continue,
    source: str = "",
    options: dict[str, Any] | None = None,
) -> RefreshResult | None:
    """Return sum_{t<rounds} of the mean of -log p(y | x, D_t) over the query samples of t; its standard error is 0.

    p is the posterior predictive distribution given the support set D_t, and given how the source draws its tasks. Each
    round is read once, whatever the number of refreshes: the state is the sum. A loss that is not finite is charged at
    ``loss_cap``, as it is for the learners.

    Args:
        context: of the learners.
        regret: the settings of the regret.
        request: the rounds.
        saved: the state of the last refresh.
        should_continue: asked before each round.
        source: the kind of the source of the tasks; by default the only one of the run.
        options: its options, as in its ``[[source]]`` table; by default those of the only one of the run.

    Raises:
        ComparatorUnavailable: if there is no exact answer to a task, or a round was discarded before it was read.
    """
    try:
        predict = load_oracle(source, options)
    except ValueError as error:
        raise ComparatorUnavailable(str(error)) from error
    chosen = zlib.crc32(json.dumps([source, options], sort_keys=True).encode())
    total, first = _restore(saved, request, chosen)
    for round in list_unread_rounds(context.buffer, range(first, request.rounds), request.skipped):
        if not should_continue():
            return None
        try:
            loss = find_bayes_loss(predict, context.buffer[round])
        except ValueError as error:
            raise ComparatorUnavailable(f"round {round}: {error}") from error
        total += loss if is_finite_loss(loss) else regret.loss_cap
    counts = {"rounds": torch.tensor(request.rounds), "options": torch.tensor(chosen)}
    state = {"total": torch.tensor(total, dtype=torch.float64), **counts}
    return RefreshResult(Comparator("bayes", request.rounds, total, 0.0), state)


def _restore(saved: Params | None, request: RefreshRequest, chosen: int) -> tuple[float, int]:
    """Return the sum of the last refresh and its number of rounds; zeros if it is of other rounds or other options."""
    # Rounds that were not durable are played again.
    if saved is None or saved["rounds"] > request.rounds or saved["options"] != chosen:
        return 0.0, 0
    return float(saved["total"]), int(saved["rounds"])


def find_bayes_loss(predict: Oracle, task: Task) -> float:
    """Return the loss of an exact Bayes predictor on a task, in nats for each query sample."""
    y, weight = task.query.y, task.query.weight
    prediction = predict(task.support, task.query.x)
    assert isinstance(y, torch.Tensor)
    return float(loss_of(prediction, y.cpu(), None if weight is None else weight.cpu()))
