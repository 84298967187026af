"""What every file of metrics keeps."""

from collections.abc import Callable
from inspect import signature

import pytest

import deploy.telemetry.metrics
from deploy.telemetry.metrics import Metric
from online_meta import registry

MODULES = {
    name: registry.load_module(deploy.telemetry.metrics, name) for name in registry.names(deploy.telemetry.metrics)
}
FUNCTIONS = {"start": 2, "count_existing": 2, "count_round": 2, "count_checkpoint": 2, "count_ranks": 3, "update": 2}
"""The functions that a file may offer, and their numbers of parameters."""

every_module = pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)


@every_module
def test_metrics_have_names_help_and_labels(module):
    for metric in module.METRICS:
        assert isinstance(metric, Metric)
        assert metric.name.startswith("online_meta_")
        assert metric.kind != "counter" or metric.name.endswith("_total")
        assert metric.help.endswith(".")
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert list(metric.buckets) == sorted(set(metric.buckets))
        assert not metric.starts_unknown or (metric.kind, metric.labels) == ("gauge", ())


@every_module
def test_functions_take_what_they_are_called_with(module):
    for name, count in FUNCTIONS.items():
        function: Callable | None = getattr(module, name, None)
        assert function is None or len(signature(function).parameters) == count


def test_no_name_is_used_twice():
    names = [metric.name for module in MODULES.values() for metric in module.METRICS]
    assert len(names) == len(set(names))
