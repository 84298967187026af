"""Iterators of tasks for the source that reads them by import path."""

from collections.abc import Iterator

import torch

from online_meta.testing.segmented import draw_classes, draw_lines
from online_meta.types import Batch, Task
from streams.sources.sinusoid import make_task

calls: list[int] = []
NOT_A_FUNCTION = 3


def with_lists() -> Iterator[Task]:
    """Yield three tasks; the second one has lists in place of tensors."""
    for number in range(3):
        task = make_task(0, number, 5, 5)
        yield Task(Batch([1.0], [2.0]), task.query) if number == 1 else task  # type: ignore[arg-type]


def plain(tasks: int = 5, seed: int = 0) -> Iterator[Task | None]:
    for t in range(tasks):
        if t % 2:
            yield None
        yield make_task(seed, t, 2, 2)


def named(tasks: int = 5) -> Iterator[tuple[str, Task]]:
    return ((f"own-{t}", make_task(0, t, 2, 2)) for t in range(tasks))


def behind(tasks: int = 5, after: int = 0) -> Iterator[Task]:
    calls.append(after)
    return (make_task(0, t, 2, 2) for t in range(after, tasks))


def broken(after: int) -> Iterator[Task]:
    yield make_task(0, after, 2, 2)
    raise OSError("the experiment broke off")


def wrong() -> list[object]:
    return [("a", "b")]


def needy(path: str, after: int) -> Iterator[Task]:
    raise NotImplementedError(path, after)


def pairs(labels: bool = False, lengths: tuple[int, ...] = (30, 22, 41, 35)) -> Iterator[object]:
    """Yield the samples of runs one by one, and sometimes None."""
    for at, pair in enumerate((draw_classes if labels else draw_lines)(0, [*lengths])):
        if at % 7 == 3:
            yield None
        yield pair


def pairs_behind(after: int = 0, labels: bool = False) -> Iterator[object]:
    calls.append(after)
    return iter([pair for pair in pairs(labels) if pair is not None][after:])


def pairs_with(others: dict[str, object]) -> Iterator[object]:
    """Yield the samples of runs with labels, some of them replaced by ``others``."""
    for at, pair in enumerate(pair for pair in pairs(labels=True) if pair is not None):
        yield others.get(str(at), pair)


def one_buffer() -> Iterator[object]:
    """Yield samples that the next one overwrites."""
    x, y = torch.zeros(2), torch.zeros(1)
    for at in range(6):
        x.fill_(at)
        yield x, y


def sequences(lengths: list[int]) -> Iterator[Task]:
    """Yield tasks of sequences with 3 features, (n, length, 3), one length per task, and 4 classes."""
    for t, length in enumerate(lengths):
        random = torch.Generator().manual_seed(t)
        x, y = torch.randn(8, length, 3, generator=random), torch.arange(8) % 4
        yield Task(Batch(x[:4], y[:4]), Batch(x[4:], y[4:]))
