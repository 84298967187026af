"""What a daemon tells of itself: no duration, count or rate is negative, whatever its clock does."""

from collections.abc import Iterator
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.support.daemon import RestartedDaemon

NOT_BELOW_ZERO = ("seconds", "_total", "_count", "_sum", "_bucket", "_bytes", "rounds", "per_second", "lag")


def negative_numbers(served: RestartedDaemon) -> list[tuple[str, float]]:
    """Return those of the daemon's metrics and of its status that are below zero and must not be."""
    metrics = httpx.get(f"{served.url}/metrics", timeout=30).raise_for_status().text
    samples = [sample for family in text_string_to_metric_families(metrics) for sample in family.samples]
    numbers = [(sample.name, sample.value) for sample in samples] + list(flatten("", served.status()))
    return [(name, value) for name, value in numbers if value < 0 and any(word in name for word in NOT_BELOW_ZERO)]


def flatten(name: str, said: Any) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a JSON document with the names that lead to them."""
    if isinstance(said, dict):
        for key, value in said.items():
            yield from flatten(f"{name}.{key}", value)
    elif isinstance(said, int | float):
        yield name, float(said)


def check_numbers(served: RestartedDaemon) -> Iterator[tuple[str, bool, str]]:
    negative = negative_numbers(served)
    yield "no duration or count is negative", not negative, str(negative[:3])
