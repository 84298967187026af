import pytest
import torch

from streams.formats import wire
from streams.history.history import History
from streams.sources import python
from streams.sources.sinusoid import SPEC, make_task
from streams.spec import Limits
from streams.types import Arrival
from tests.support import feeds
from tests.support.ingesting import Open, until

HERE = "tests.support.feeds"


def opened(function: str, **args: object):
    return python.create_source(python.Settings(f"{HERE}:{function}", args), SPEC, "mine", 0)


def read(function: str, after: str | None = None, **args: object) -> list[Arrival]:
    stream, found, idle = opened(function, **args).read(after), [], 0
    while idle < 5:
        item = next(stream)
        idle = 0 if item else idle + 1
        found += [item] if item else []
    return found


@pytest.mark.parametrize("function", ["plain", "named", "behind"])
def test_tasks_come_in_order_and_resume_from_any_position(function: str) -> None:
    found = read(function)
    prefix = "own" if function == "named" else "mine"
    assert [arrival.id for arrival in found] == [f"{prefix}-{t}" for t in range(5)]
    for t, arrival in enumerate(found):
        task = wire.decode(arrival.body, SPEC, Limits())
        assert torch.equal(task.query.y, make_task(0, t, 2, 2).query.y)
        assert read(function, after=arrival.cursor) == found[t + 1 :]
    assert read(function, after="99") == []


def test_a_function_with_after_starts_at_the_position() -> None:
    feeds.calls.clear()
    read("behind", after="3")
    assert feeds.calls == [3]


def test_arguments_come_from_the_configuration() -> None:
    assert len(read("plain", tasks=2)) == 2
    assert read("plain", seed=1)[0].body != read("plain")[0].body


@pytest.mark.parametrize(
    ("path", "args", "message"),
    [
        ("nope", {}, "no import path"),
        (f"{HERE}:nope", {}, "has no 'nope'"),
        (f"{HERE}:NOT_A_FUNCTION", {}, "is int, not a function"),
        (f"{HERE}:plain", {"task": 1}, "does not accept args"),
        (f"{HERE}:needy", {}, "does not accept args"),
    ],
)
def test_an_invalid_function_is_refused_when_the_source_is_opened(path: str, args: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        python.create_source(python.Settings(path, args), SPEC, "mine", 0)


def test_an_invalid_task_or_position_is_reported() -> None:
    with pytest.raises(TypeError, match="the iterator yielded tuple"):
        read("wrong")
    with pytest.raises(ValueError, match="the position 'x'"):
        read("plain", after="x")


def test_an_item_that_is_no_task_of_tensors_is_refused_and_the_iterator_continues() -> None:
    first, bad, last = read("with_lists")
    assert (first.rejection, last.rejection, last.cursor) == (None, None, "3")
    assert bad.rejection is not None
    assert bad.rejection.reason == "unreadable"
    assert bad.rejection.detail.startswith(
        "item 1 is not a task of tensors: TypeError: a tensor or a dict of tensors is needed here, not a list"
    )


def test_a_failed_iterator_restarts_after_the_last_durable_task(open_ingest: Open, faulty: History) -> None:
    ingest = open_ingest()
    ingest._spec = SPEC
    ingest.pull("mine", opened("broken"))
    until(lambda: len(faulty) == 2)
    ingest.close()
    assert [faulty.entry(n).id for n in range(2)] == ["mine-0", "mine-1"]
    assert torch.equal(faulty[1].query.y, make_task(0, 1, 2, 2).query.y)
