"""Predictions as tensors with names: what a request to adapt is answered, and what is kept until labels arrive."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load, save
from torch import Tensor

from online_meta.batches import as_named, map_tensors, name_tensors
from online_meta.functional.model import find_outcome
from online_meta.learners.hierarchical_bayes import LEAST
from online_meta.outcomes import LossFunction, average_outputs
from online_meta.prediction import mean_of, pool, probabilities_of
from online_meta.registry import import_by_path
from online_meta.types import Component, Outcome, Prediction, Tensors
from online_meta.uncertainty import information_of, quantiles_of, std_of
from streams.formats.wire import gather_tensors
from streams.types import Rejected
from trainers.settings import ModelSettings

Part = Literal["mean", "std", "probabilities", "information"]
"""What can be asked for beside the predictions."""

MOST_SAMPLES = 100
"""The largest number of samples that can be asked for: each takes an inner loop, and a copy of the weights."""

_PARTS: dict[Part, Callable[[Prediction], Tensor | None]] = {
    "mean": mean_of,
    "std": std_of,
    "probabilities": probabilities_of,
    "information": information_of,
}


class AnswerFormat(NamedTuple):
    """How a prediction is answered, and what is answered beside it.

    Attributes:
        as_json: JSON instead of safetensors.
        parts: what to add.
        levels: probabilities between 0 and 1 whose quantiles to add.
        samples: the number of samples of a belief that the prediction is made of; None for the run's number.
    """

    as_json: bool = False
    parts: tuple[Part, ...] = ()
    levels: tuple[float, ...] = ()
    samples: int | None = None


PLAIN = AnswerFormat()


def encode_predictions(prediction: Prediction, format: AnswerFormat = PLAIN, outside: Tensor | None = None) -> bytes:
    """Return a prediction as safetensors bytes.

    Args:
        prediction: the prediction.
        format: what to add.
        outside: which rows lie outside of the inputs that the run has seen, (n,) of bool.

    Returns:
        ``predictions`` (n, ...) is the model's output, or for a mixture, the output that says what it says as far as
        one output can; ``labels`` (n,) int64, for classes, are the most probable ones. A mixture of several outputs has
        each component k whole: ``component.k.outputs`` (S, n, ...) and ``component.k.log_weights`` (S,). If an output
        is a dict, its keys follow the names after a dot. Each of ``format.parts`` has its name: ``mean`` (n, ...) is
        the expected target, ``std`` (n, ...) its standard deviation, ``probabilities`` (n, classes, ...) are those of
        the classes, and ``information`` (n,) is what the label of a row would say; see ``information_of``. With
        ``levels`` (q,), ``quantiles`` are (q, n, ...). ``outside`` (n,) is there if it is true of a row.

    Raises:
        Rejected: with the reason "no_distribution", if the prediction does not have what is asked for.
    """
    pooled = pool(prediction)
    single = len(pooled) == 1 and len(pooled[0].log_weights) == 1
    output = map_tensors(lambda tensor: tensor[0], pooled[0].outputs) if single else _average_outputs(pooled)
    tensors = name_tensors("predictions", output)
    probabilities = probabilities_of(prediction)
    if probabilities is not None:
        tensors["labels"] = probabilities.argmax(1 if probabilities.dim() > 1 else 0)
    if len(prediction) > 1 or len(prediction[0].log_weights) > 1:
        tensors |= name_prediction(prediction)
    if format.parts or format.levels:
        dtype = next(iter(output.values())).dtype if isinstance(output, dict) else output.dtype
        tensors |= {name: value.to(dtype, copy=True) for name, value in _describe(prediction, format).items()}
    if outside is not None and bool(outside.any()):
        tensors["outside"] = outside
    return save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})


def _describe(prediction: Prediction, format: AnswerFormat) -> dict[str, Tensor]:
    found: dict[str, Tensor | None] = {part: _PARTS[part](prediction) for part in format.parts}
    if format.levels:
        found["quantiles"] = quantiles_of(prediction, format.levels)
        found["levels"] = torch.tensor(format.levels, dtype=torch.float64)
    missing = [name for name, value in found.items() if value is None]
    if missing:
        losses = "gaussian or gaussian_of_noise" if missing[0] != "probabilities" else "categorical"
        raise Rejected(
            "no_distribution",
            f"the answers of this run have no {missing[0]}: its loss does not say how probable each target is; "
            f"[model] loss = {losses} does",
        )
    return {name: value for name, value in found.items() if value is not None}


def name_outcomes(prediction: Prediction, model: ModelSettings) -> list[dict[str, Any]]:
    """Return the name and the options of the outcome of each component, from which ``restore_prediction`` makes it.

    Args:
        prediction: an answer of the run.
        model: of the run.

    Raises:
        Rejected: with the reason "model_error", if a component has another outcome than the run's loss, as that of a
            user's own learner may.
    """
    named = [(model.loss, model.loss_options), ("gaussian", {"least": LEAST})]
    known = [(build_outcome(loss, options), loss, options) for loss, options in named]
    found = []
    for component in prediction:
        own = component.outcome._replace(loss=None)  # It may refuse more outputs, but says the same.
        same = [(loss, options) for outcome, loss, options in known if outcome._replace(loss=None) == own]
        if not same:
            raise Rejected("model_error", "the learner that answers has an outcome of its own, which cannot be kept")
        found.append({"loss": same[0][0], "options": same[0][1]})
    return found


def name_prediction(prediction: Prediction) -> dict[str, Tensor]:
    """Return the tensors of all components by name, on the CPU."""
    tensors: dict[str, Tensor] = {}
    for k, component in enumerate(prediction):
        tensors |= name_tensors(f"component.{k}.outputs", component.outputs)
        tensors[f"component.{k}.log_weights"] = component.log_weights
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def restore_prediction(tensors: Mapping[str, Tensor], outcomes: Sequence[Mapping[str, Any]]) -> Prediction:
    """Return the prediction of ``name_prediction`` and ``name_outcomes``; tensors of other names are left alone."""
    return tuple(
        Component(
            build_outcome(one["loss"], one["options"]),
            gather_tensors(tensors, f"component.{k}.outputs"),
            tensors[f"component.{k}.log_weights"],
        )
        for k, one in enumerate(outcomes)
    )


def build_outcome(loss: str, options: Mapping[str, Any]) -> Outcome:
    """Return the outcome of ``[model] loss`` and ``loss_options``; raises ``ValueError`` for an unknown one."""
    return find_outcome(import_by_path(loss) if ":" in loss else loss, options)


def _average_outputs(pooled: Prediction) -> Tensors:
    """Return the expected targets; under a loss of the user's own, of which these are not known, the mean output."""
    first = pooled[0]
    if not (isinstance(first.outputs, dict) and isinstance(first.outcome.loss, LossFunction)):
        return mean_of(pooled)
    weights = torch.cat([part.log_weights for part in pooled]).exp()
    parts = [as_named(part.outputs) for part in pooled]
    return {name: average_outputs(torch.cat([part[name] for part in parts]), weights) for name in first.outputs}


def decode_predictions(body: bytes) -> dict[str, Tensor]:
    """Return the tensors that ``encode_predictions`` has encoded."""
    return load(body)
