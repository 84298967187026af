"""What is known about how a source answers."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future

from streams.ingest.source_reader import LagMonitor, SourceState, SourceStates, read_until_closed
from streams.types import Arrival, Receipt
from tests.support.ingesting import until


class Broker:
    """A source that fails, or answers that there is nothing."""

    def __init__(self) -> None:
        self.fails = False

    def read(self, after: str | None) -> Iterator[Arrival | None]:
        while not self.fails:
            yield None
        raise ConnectionError("refused")

    def lag(self, after: str | None) -> int | None:
        if self.fails:
            raise ConnectionError("no lag")
        return 3


def test_a_state_names_the_errors_in_a_row_and_when_they_began() -> None:
    now = [10.0]
    states = SourceStates(lambda: now[0])
    assert states.states() == {}
    states.note("queue", "read")
    assert states.states() == {"queue": SourceState(10.0, (), None)}
    now[0] = 12.0
    states.note("queue", "read", "refused")
    now[0] = 13.0
    states.note("queue", "lag", "no lag")
    states.note("queue", "read", "refused again")
    assert states.states()["queue"] == SourceState(10.0, (("read", "refused again"), ("lag", "no lag")), 12.0)
    now[0] = 14.0
    states.note("queue", "read")
    assert states.states()["queue"] == SourceState(14.0, (("lag", "no lag"),), 12.0)
    states.note("queue", "lag")
    assert states.states()["queue"] == SourceState(14.0, (), None)


def test_reading_and_polling_record_failures_and_recoveries() -> None:
    states, broker, closing = SourceStates(), Broker(), threading.Event()

    def submit(arrival: Arrival) -> "Future[Receipt]":
        raise AssertionError(arrival)

    reading = threading.Thread(
        target=read_until_closed,
        args=("queue", broker, submit, lambda name: None, closing),
        kwargs={"on_read": lambda error: states.note("queue", "read", error)},
    )
    reading.start()
    polling = LagMonitor(
        {"queue": broker},
        lambda name: None,
        lambda *lag: None,
        0.001,
        lambda name, error: states.note(name, "lag", error),
    )
    try:
        until(lambda: "queue" in states.states() and states.states()["queue"].answered is not None)
        assert states.states()["queue"].errors == ()
        broker.fails = True
        expected = {"read": "ConnectionError: refused", "lag": "ConnectionError: no lag"}
        until(lambda: dict(states.states()["queue"].errors) == expected)
        broker.fails = False
        until(lambda: states.states()["queue"].failing_since is None)
    finally:
        closing.set()
        reading.join()
        polling.close()
