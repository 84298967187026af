"""Cut rows without task boundaries where ``online_meta.changepoints.detectors`` finds a change of task."""

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
"""The likelihood that is no file: the loss of the run's own leader."""


def build_segmenter(change: str, options: dict[str, Any], likelihood: Likelihood) -> Segmenter:
    """Return the segmenter that a configuration names; raises ``ValueError`` for an unknown name or option."""
    build = registry.load(online_meta.changepoints.detectors, change)
    found: Segmenter = call_with_options(build, "change_options", {"likelihood": likelihood}, options)
    return found


def build_likelihood(spec: TaskSpec, likelihood: str | None, options: dict[str, Any]) -> Likelihood:
    """Return the conjugate likelihood that a configuration names, or that fits the labels.

    Raises ``ValueError`` for an unknown name or option, or one that does not fit.
    """
    fitting = "gaussian_classes" if spec.y == "class" else "linear"
    if likelihood not in (None, fitting):
        known = [*registry.names(online_meta.changepoints.likelihoods), LEADER]
        if likelihood not in known:
            raise ValueError(f"likelihood = {likelihood!r}: {registry.nearest(likelihood, known)}")
        raise ValueError(f"likelihood = {likelihood!r} is not for y = {spec.y!r}; {fitting!r} is, or {LEADER!r}")
    size = {"inputs": prod(spec.x_shape), "outputs": spec.ways or prod(spec.y_shape)}
    build = registry.load(online_meta.changepoints.likelihoods, fitting)
    found: Likelihood = call_with_options(build, "likelihood_options", size, options)
    return found


def call_with_options(
    build: Callable[..., Any], option_name: str, arguments: dict[str, Any], options: dict[str, Any]
) -> Any:
    """Call a function with options checked against its signature; raises ``ValueError`` naming ``option_name``."""
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
    """The segmenter's memory, how many rows there were, where the first began, and which of them were no samples."""

    memory: Params
    rows: int
    begin: int
    bad: tuple[int, ...]


def cut_by_change(segmenter: Segmenter, encode: EncodeRow, ways: int | None, most: int) -> Cut:
    """Return the cut where ``segmenter`` finds a change, and after ``most`` rows.

    A row that is no sample, for which its task will be refused, is not shown to the segmenter. Labels lie below
    ``ways``; None: there are targets.
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
    """Return which row a sample is, both counted from 0, where the rows ``bad`` are no samples."""
    for row in bad:
        sample += row <= sample
    return sample


def read_sample(row: Row, encode: EncodeRow, ways: int | None) -> tuple[Tensor, Tensor] | None:
    """Return a row's sample and its label or target; None if it is none that a task could have."""
    try:
        sample, target = encode(row)
    except Rejected:
        return None
    fits = ways is None or 0 <= int(target) < ways
    if not (fits and np.isfinite(sample).all() and np.isfinite(target).all()):
        return None
    return torch.from_numpy(sample), torch.from_numpy(target)
