"""Prometheus metrics, one subject a file: the folder is the registry.

A file offers ``METRICS``, a tuple of ``Metric``, and any of these functions, which set its instruments. They get all
instruments, by name without the prefix "online_meta_":

- ``start(instruments, engine)``: once, when the daemon starts; ``engine`` is the kind of engine.
- ``count_existing(instruments, view)``: once, for the rounds that the run had before.
- ``count_round(instruments, line)``: for each new line of rounds.jsonl.
- ``count_checkpoint(instruments, line)``: for each new line of checkpoints.jsonl.
- ``count_quarantine(instruments, quarantine)``: for each quarantined round.
- ``count_ranks(instruments, restarts, done)``: the new restarts, and for each rank the amounts since the last call.
- ``update(instruments, state)``: before the metrics are read; ``state`` is a ``MetricState``.

Other packages add such modules through entry points of the group ``online_meta.metrics``.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from deploy.telemetry.health import Check
from deploy.telemetry.run_view import RunView

Instruments = dict[str, Any]
"""Instruments of prometheus_client by their names, without "online_meta_"."""


class Metric(NamedTuple):
    """A Prometheus metric.

    Attributes:
        name: the full name.
        kind: of the instrument.
        help: one line, with the unit where the name has none.
        labels: the names of the labels.
        buckets: the upper bounds of a histogram.
        starts_unknown: whether a gauge is NaN until it is set, which means "unknown"; 0 would be a claim.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    starts_unknown: bool = False


class MetricState(NamedTuple):
    """What gauges are set from.

    Attributes:
        view: the run's files, read up to now.
        pending: the number of rounds that are durable and not yet learned.
        oldest_pending_age: returns the age in seconds of the oldest of these, None if there is none.
        history_bytes: the size of the history on disk.
        world_size: the number of ranks that play now.
        checks: the health of the run.
    """

    view: RunView
    pending: int
    oldest_pending_age: Callable[[], float | None]
    history_bytes: int
    world_size: int
    checks: tuple[Check, ...] = ()
