"""The metrics of ``deploy.telemetry.metrics`` as a Prometheus registry, fed from the run's files and the daemon."""

from collections.abc import Mapping
from math import nan
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

import deploy.telemetry.metrics
from deploy.telemetry.metrics import Instruments, Metric, MetricState
from deploy.telemetry.run_view import RunView
from online_meta import registry
from trainers.journal.jsonl import Line
from trainers.journal.quarantine import Quarantine

PREFIX = "online_meta_"

MODULES = tuple(
    registry.load_module(deploy.telemetry.metrics, name) for name in registry.names(deploy.telemetry.metrics)
)

METRICS: tuple[Metric, ...] = tuple(metric for module in MODULES for metric in module.METRICS)


def make_instruments(collectors: CollectorRegistry) -> Instruments:
    """Make an instrument for every metric in ``collectors``; return them by name without the prefix."""
    return {metric.name.removeprefix(PREFIX): _make(metric, collectors) for metric in METRICS}


def _make(metric: Metric, collectors: CollectorRegistry) -> Any:
    if metric.kind == "histogram":
        return Histogram(metric.name, metric.help, metric.labels, registry=collectors, buckets=metric.buckets)
    kind = Counter if metric.kind == "counter" else Gauge
    instrument = kind(metric.name, metric.help, metric.labels, registry=collectors)
    if isinstance(instrument, Gauge) and metric.starts_unknown:
        instrument.set(nan)
    return instrument


def start_metrics(instruments: Instruments, engine: str, view: RunView) -> None:
    """Set what does not change while the daemon runs, and count the rounds that the run had before."""
    _call("start", instruments, engine)
    _call("count_existing", instruments, view)


def count_round(instruments: Instruments, line: Line) -> None:
    """Count a new round."""
    _call("count_round", instruments, line)


def count_checkpoint(instruments: Instruments, line: Line) -> None:
    """Count a new checkpoint."""
    _call("count_checkpoint", instruments, line)


def count_quarantine(instruments: Instruments, quarantine: Quarantine) -> None:
    """Count a quarantined round."""
    _call("count_quarantine", instruments, quarantine)


def count_ranks(instruments: Instruments, restarts: int, done: Mapping[int, Mapping[str, float]]) -> None:
    """Count ``restarts``, and for each rank the amounts since the last call."""
    _call("count_ranks", instruments, restarts, done)


def update_gauges(instruments: Instruments, state: MetricState) -> None:
    """Set the gauges to the current state."""
    _call("update", instruments, state)


def _call(function: str, *arguments: Any) -> None:
    for module in MODULES:
        if (found := getattr(module, function, None)) is not None:
            found(*arguments)
