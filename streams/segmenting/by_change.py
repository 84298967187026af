"""Cut rows without task boundaries where a detector of ``online_meta.changepoints.detectors`` finds a change."""

import inspect
from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple, get_type_hints

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

import online_meta.changepoints.detectors
import online_meta.changepoints.likelihoods
from online_meta import registry
from online_meta.changepoints.segments import Likelihood, Segmenter
from online_meta.types import Params
from streams.formats.rows import EncodeRow, Row
from streams.segmenting.cutting import Cut, is_full
from streams.spec import TaskSpec
from streams.types import Rejected

LEADER = "leader"
"""The name of the likelihood that is not in the registry: the loss of the run's own leader."""


def build_segmenter(change: str, options: dict[str, Any], likelihood: Likelihood) -> Segmenter:
    """Build the segmenter that a configuration names.

    Args:
        change: the name of a detector.
        options: its ``change_options``.
        likelihood: scores samples under a task.

    Raises:
        ValueError: if the name or an option is unknown.
    """
    build = registry.load(online_meta.changepoints.detectors, change)
    found: Segmenter = call_with_options(build, "change_options", {"likelihood": likelihood}, options)
    return found


def build_likelihood(spec: TaskSpec, likelihood: str | None, options: dict[str, Any]) -> Likelihood:
    """Build the conjugate likelihood that a configuration names.

    Args:
        spec: the shape and dtypes of the run's tasks.
        likelihood: its name; None for the one that fits ``spec.y``.
        options: its ``likelihood_options``.

    Raises:
        ValueError: if the name or an option is unknown, or the likelihood does not fit ``spec.y``.
    """
    fitting = "gaussian_classes" if spec.y == "class" else "linear"
    if likelihood not in (None, fitting):
        known = [*registry.names(online_meta.changepoints.likelihoods), LEADER]
        if likelihood not in known:
            raise ValueError(f"likelihood = {likelihood!r}: {registry.nearest(likelihood, known)}")
        raise ValueError(f"likelihood = {likelihood!r} is not for y = {spec.y!r}; {fitting!r} is, or {LEADER!r}")
    size = {"inputs": prod(spec.require_single_input("change")), "outputs": spec.ways or prod(spec.y_shape)}
    build = registry.load(online_meta.changepoints.likelihoods, fitting)
    found: Likelihood = call_with_options(build, "likelihood_options", size, options)
    return found


def call_with_options(
    build: Callable[..., Any], option_name: str, arguments: dict[str, Any], options: dict[str, Any]
) -> Any:
    """Call a function with options checked against its signature.

    Args:
        build: the function; its annotations give the types of its options.
        option_name: the name of the configuration key, for error messages.
        arguments: arguments that are not options.
        options: the options from the configuration.

    Raises:
        ValueError: if an option is unknown or has a wrong type; the message names the option.
    """
    types = get_type_hints(build, include_extras=True)
    known = [option for option in inspect.signature(build).parameters if option not in arguments]
    for option, value in options.items():
        if option not in known:
            raise ValueError(f"{option_name} has no key {option!r}: {registry.nearest(option, known)}")
        try:
            TypeAdapter(types[option]).validate_python(value, strict=True)
        except ValidationError as error:
            raise ValueError(f"{option_name}.{option} = {value!r}: {error.errors()[0]['msg']}") from error
    return build(**arguments, **options)


class _CutState(NamedTuple):
    """The state of a cut since the last task ended.

    Attributes:
        memory: the state of the segmenter.
        rows: the number of rows.
        begin: the position of the first row.
        bad: the indices of rows that are not valid samples.
    """

    memory: Params
    rows: int
    begin: int
    bad: tuple[int, ...]


def cut_by_change(segmenter: Segmenter, encode: EncodeRow, ways: int | None, most: int) -> Cut:
    """Return a cut that ends tasks where ``segmenter`` finds a change, and after at most ``most`` rows.

    A row that is not a valid sample is not passed to the segmenter; the task that contains it will be rejected.

    Args:
        segmenter: the change detector.
        encode: returns the sample of a row and its label or target.
        ways: the number of classes; None if rows have real targets.
        most: the largest number of rows in a task.
    """

    def update(state: _CutState | None, row: Row) -> tuple[_CutState, int]:
        state = state or _CutState(segmenter.start(), 0, row.begin, ())
        sample = read_sample(row, encode, ways)
        count = None
        if sample is None:
            state = state._replace(rows=state.rows + 1, bad=(*state.bad, state.rows))
        else:
            state = state._replace(rows=state.rows + 1, memory=segmenter.update(state.memory, *sample))
            count = segmenter.change(state.memory)
        if count is not None:
            return state, _row_index(count, state.bad)
        return state, state.rows if is_full(state.rows, state.begin, row, most) else 0

    return Cut(lambda: None, update)


def _row_index(sample: int, bad: tuple[int, ...]) -> int:
    """Return the row index of a sample index, both from 0, where the rows ``bad`` are not valid samples."""
    for row in bad:
        sample += row <= sample
    return sample


def read_sample(row: Row, encode: EncodeRow, ways: int | None) -> tuple[Tensor, Tensor] | None:
    """Return the sample of a row and its label or target as tensors; None if a task could not contain them."""
    try:
        sample, target = encode(row)
    except Rejected:
        return None
    fits = ways is None or 0 <= int(target) < ways
    if not (fits and np.isfinite(sample).all() and np.isfinite(target).all()):
        return None
    return torch.from_numpy(sample), torch.from_numpy(target)
