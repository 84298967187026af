"""Check that no duration, count or rate that a daemon reports is negative, whatever its clock does."""

from collections.abc import Iterator
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.support.daemon import RestartedDaemon

NOT_BELOW_ZERO = ("seconds", "_total", "_count", "_sum", "_bucket", "_bytes", "rounds", "per_second", "lag")


def negative_numbers(served: RestartedDaemon) -> list[tuple[str, float]]:
    """Return the numbers in the daemon's metrics and status that must not be negative but are."""
    metrics = httpx.get(f"{served.url}/metrics", timeout=30).raise_for_status().text
    samples = [sample for family in text_string_to_metric_families(metrics) for sample in family.samples]
    numbers = [(sample.name, sample.value) for sample in samples] + list(flatten("", served.status()))
    return [(name, value) for name, value in numbers if value < 0 and any(word in name for word in NOT_BELOW_ZERO)]


def flatten(name: str, said: Any) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a JSON document, each with its path."""
    if isinstance(said, dict):
        for key, value in said.items():
            yield from flatten(f"{name}.{key}", value)
    elif isinstance(said, int | float):
        yield name, float(said)


def check_numbers(served: RestartedDaemon) -> Iterator[tuple[str, bool, str]]:
    negative = negative_numbers(served)
    yield "no duration or count is negative", not negative, str(negative[:3])
