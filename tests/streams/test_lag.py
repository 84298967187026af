import math
from collections.abc import Iterator

from streams.ingest.source_reader import LagMonitor
from streams.types import Arrival
from tests.support.ingesting import until


class Queue:
    """A source whose broker holds ten entries, cannot say how many, or does not answer."""

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


def test_each_source_is_asked_behind_its_position_and_what_is_not_known_is_no_number() -> None:
    first, second, told = Queue([10, ConnectionError("away"), 7]), Queue([None]), []
    sources = {"a": first, "b": second, "plain": Plain(), "pushed": None}
    watch = LagMonitor(sources, {"a": "5", "b": None}.get, lambda *said: told.append(said), interval=0.001)
    until(lambda: ("a", 7.0) in told and any(name == "b" for name, _ in told))
    watch.close()
    said = [waiting for name, waiting in told if name == "a"]
    assert said[0] == 10.0
    assert math.isnan(said[1])
    assert said[2] == 7.0
    assert all(math.isnan(waiting) for name, waiting in told if name == "b")
    assert {name for name, _ in told} == {"a", "b"}
    assert set(first.asked) == {"5"}
    assert not [thread for thread in watch._threads if thread.is_alive()]
