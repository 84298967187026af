"""Health: the checks of `/v1/health`."""

from deploy.telemetry.health import LEVELS
from deploy.telemetry.metrics import Instruments, Metric, MetricState

METRICS = (
    Metric("online_meta_health", "gauge", "Level of a check: 0 ok, 1 it needs attention, 2 it fails.", ("check",)),
)


def update(instruments: Instruments, state: MetricState) -> None:
    """Set the level of each check."""
    for check in state.checks:
        instruments["health"].labels(check=check.name).set(LEVELS.index(check.level))
