"""What learners share that answer in closed form: which outcomes they answer, and samples as rows of numbers."""

import math
from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from online_meta.batches import map_tensors, name_tensors, only_tensor, select_samples
from online_meta.functional.classes import IGNORED_CLASS
from online_meta.functional.model import ModelLoss
from online_meta.learners import LearnerContext, TaskShape
from online_meta.prediction import point
from online_meta.types import Batch, Prediction, Tensors

CLASSES = {"cross_entropy": "_classes", "categorical": "_classes"}
"""The outcomes whose outputs are logits of classes, with the modules that define their likelihood."""

MEANS = {"mse": "mse", "gaussian_of_noise": "gaussian_of_noise"}
"""The outcomes whose outputs are expected targets, with the modules that define their likelihood."""

NUMBERS = ("uint8", "float16", "float32", "float64")
"""The dtypes of inputs that are quantities; integers of 64 bits are names, such as those of tokens."""

MOST_SAMPLES = 64
"""Of how many shapes of inputs the shape of the output is remembered."""

MOST_INPUTS = 4096
"""The largest number of inputs of which sums of squares over all rounds are kept, 128 MiB."""

SMALL_MATRIX = 64
"""The largest matrix whose root is computed in two ways at once, so that no value decides what is computed."""

QUICK_SQUARES, QUICK_INPUTS = 784, 32768
"""The largest numbers of inputs that cost milliseconds a round: of such sums, and of the samples of one task."""


class Outputs(NamedTuple):
    """What a learner that does not use the model's parameters has to answer with.

    Attributes:
        loss: the name of the outcome.
        of_classes: whether an output is logits of classes, (n, classes, ...), or else the expected targets.
        sample: x -> an output (...) of the model for a row like those of x, whose shape and dtype the answers have.
        predict: outputs (n, ...) -> the prediction.
    """

    loss: str
    of_classes: bool
    sample: Callable[[Tensors], Tensor]
    predict: Callable[[Tensor], Prediction]


def find_outputs(context: LearnerContext, learner: str, *, regression: bool = True) -> Outputs:
    """Return what the run's outputs mean.

    Args:
        context: what all learners share. The model is called only for the shape of its output.
        learner: the name of the learner, for errors.
        regression: whether the learner answers the outcomes of ``MEANS``, too.

    Raises:
        ValueError: if the outcome is none of those that the learner can answer, which the message names.
    """
    known = {**CLASSES, **(MEANS if regression else {})}
    loss, start = context.inner.loss, context.start.weights
    module = getattr(loss.outcome.nll, "__module__", None) if isinstance(loss, ModelLoss) else None
    own = [name for name, file in known.items() if module == f"online_meta.outcomes.{file}"]
    if not own or not isinstance(loss, ModelLoss):
        raise ValueError(f"{learner} cannot answer this loss: it answers {', '.join(known)}, made with om.model_loss")
    outcome = loss.answer_outcome
    known_samples: dict[object, Tensor] = {}

    def sample(x: Tensors) -> Tensor:
        first = map_tensors(lambda tensor: tensor[:1], x)
        key = tuple((name, one.shape, one.dtype, one.device) for name, one in sorted(name_tensors("x", first).items()))
        if key not in known_samples:
            with torch.no_grad():
                found = only_tensor(loss.answer(start, first))[0]
            if len(known_samples) >= MOST_SAMPLES:
                known_samples.clear()
            known_samples[key] = found
        return known_samples[key]

    return Outputs(own[0], own[0] in CLASSES, sample, lambda outputs: point(outcome, outputs))


def count_classes(batch: Batch, classes: int) -> tuple[Tensor, Tensor]:
    """Return the one-hot classes (n, classes, ...) and the weights (n,) of the samples, in float64.

    Entries of class -100 are zeros. Targets that are probabilities of classes stay as they are. Samples of weight 0 are
    left out.
    """
    batch, weight = _drop_padding(batch)
    y = only_tensor(batch.y)
    if y.is_floating_point():
        return y.double(), weight
    counts = y != IGNORED_CLASS
    hot = F.one_hot(y.long().where(counts, 0), classes).double() * counts[..., None]
    return hot.movedim(-1, 1), weight


def find_targets(batch: Batch, outputs: Outputs, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the targets (n, ...) of the shape of the outputs, and the weights (n,), in float64.

    Args:
        batch: the samples; those of weight 0 are left out.
        outputs: what the outputs mean.
        like: the output of one row.
    """
    if outputs.of_classes:
        return count_classes(batch, len(like))
    batch, weight = _drop_padding(batch)
    return only_tensor(batch.y).double(), weight


def find_rows(batch: Batch, outputs: Outputs, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the inputs (n, d), the targets (n, k) and the weights (n,) of the samples, as rows in float64.

    Samples of weight 0 and of class -100 are left out.

    Raises:
        ValueError: if a row has several classes, such as an image of classes.
    """
    if outputs.of_classes and like.ndim != 1:
        raise ValueError(
            f"the output of a row has shape {tuple(like.shape)}: one class a row is needed here, logits (classes,)"
        )
    targets, weight = find_targets(batch, outputs, like)
    x, targets = flatten_inputs(_drop_padding(batch)[0].x), targets.reshape(len(targets), like.numel())
    if not outputs.of_classes:
        return x, targets, weight
    counted = targets.sum(1) > 0
    return x[counted], targets[counted], weight[counted]


def flatten_inputs(x: Tensors) -> Tensor:
    """Return the inputs as rows (n, d) in float64; the tensors of a dict follow each other in the order of names."""
    parts = [x] if isinstance(x, Tensor) else [x[name] for name in sorted(x)]
    return torch.cat([(part.flatten(1) if part.ndim > 1 else part[:, None]).double() for part in parts], 1)


def add_constant(rows: Tensor) -> Tensor:
    """Return the rows (n, d) with a last column of ones."""
    return torch.cat([rows, rows.new_ones(len(rows), 1)], 1)


def check_inputs(rows: Tensor, per: str) -> None:
    """Raise ``ValueError`` if the squares of rows (n, d + 1) are too many to be kept; those of one task are not."""
    inputs = rows.shape[1] - 1
    if per != "task" and inputs > MOST_INPUTS:
        raise ValueError(
            f"per = {per!r} keeps the squares of {inputs} inputs: at most {MOST_INPUTS} are possible; choose "
            "per = 'task'"
        )


def fits_rows(tasks: TaskShape, losses: Collection[str], *, pooled: bool = False) -> bool:
    """Return whether a learner of rows (n, d) can answer such tasks in milliseconds a round.

    Args:
        tasks: what the tasks of the run look like.
        losses: the names of the losses that the learner answers.
        pooled: whether it keeps the squares of the inputs of all rounds, which then are equally many in every task.
    """
    if tasks.loss not in losses or tasks.x_dtype not in NUMBERS:
        return False
    if tasks.loss in CLASSES and tasks.y_shape != ():
        return False
    if any(size < 0 for size in tasks.x_shape):
        return not pooled
    return math.prod(tasks.x_shape) <= (QUICK_SQUARES if pooled else QUICK_INPUTS)


def find_root(squares: Tensor) -> Tensor:
    """Return the lower triangle L with L L' = squares, a positive definite matrix; NaN if it is not finite.

    Where rounding makes the matrix indefinite, as for inputs of 1e9 that depend on each other, its diagonal is raised
    by a billionth.
    """
    root, failed = torch.linalg.cholesky_ex(squares)
    if len(squares) > SMALL_MATRIX and not failed:
        found: Tensor = root
        return found
    raised, again = torch.linalg.cholesky_ex(squares + 1e-9 * squares.diagonal().diag())
    return torch.where(failed == 0, root, torch.where(again == 0, raised, math.nan))


def _drop_padding(batch: Batch) -> tuple[Batch, Tensor]:
    """Return the samples whose weight is not 0, and their weights in float64."""
    y = only_tensor(batch.y)
    if batch.weight is None:
        return batch, torch.ones(len(y), dtype=torch.float64, device=y.device)
    kept = select_samples(batch, batch.weight != 0)
    assert kept.weight is not None
    return kept, kept.weight.double()
