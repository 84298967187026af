import math
from collections.abc import Iterator

from streams.ingest.source_reader import LagMonitor
from streams.types import Arrival
from tests.support.ingesting import until


class Queue:
    """A source with a broker that reports ten entries, reports no number, or does not answer."""

    def __init__(self, answers: list[int | Exception | None]) -> None:
        self.answers = answers
        self.asked: list[str | None] = []

    def read(self, after: str | None) -> Iterator[Arrival | None]:
        yield None

    def lag(self, after: str | None) -> int | None:
        self.asked.append(after)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


class Plain:
    def read(self, after: str | None) -> Iterator[Arrival | None]:
        yield None


def test_lag_is_measured_after_each_position_and_unknown_lag_is_nan() -> None:
    first, second, published = Queue([10, ConnectionError("away"), 7]), Queue([None]), []
    sources = {"a": first, "b": second, "plain": Plain(), "pushed": None}
    watch = LagMonitor(sources, {"a": "5", "b": None}.get, lambda *said: published.append(said), interval=0.001)
    until(lambda: ("a", 7.0) in published and any(name == "b" for name, _ in published))
    watch.close()
    said = [waiting for name, waiting in published if name == "a"]
    assert said[0] == 10.0
    assert math.isnan(said[1])
    assert said[2] == 7.0
    assert all(math.isnan(waiting) for name, waiting in published if name == "b")
    assert {name for name, _ in published} == {"a", "b"}
    assert set(first.asked) == {"5"}
    assert not [thread for thread in watch._threads if thread.is_alive()]
