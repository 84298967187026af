"""Read past tasks from the durable history to the trainer's device, and prefetch them."""

import contextlib
import errno
import mmap
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_leaves

from online_meta.batches import map_tensors
from online_meta.replay._task_stacks import TaskStack, extend_in_memory
from online_meta.types import Task
from streams.formats.wire import decode_payload
from streams.history.archive_index import list_forgotten
from streams.history.errors import HistoryError
from streams.history.history import History
from streams.history.retention import RetainedRounds, last_decision, retained_rounds
from trainers.distributed.ranks import SINGLE_PROCESS, RankGroup

MAX_TASKS, MAX_BYTES = 256, 64 * 1024 * 1024
"""Limits of prefetched tasks per reader, and of bytes for all readers; a read in progress may exceed the latter."""


STACK_BYTES = 64 * 1024 * 1024
"""Limit of the tasks that are kept as stacked tensors in memory, in bytes."""

FILE_BYTES = 4 * 1024 * 1024 * 1024
"""Limit of each part of stacked tasks, such as the inputs of their query sets, in a file, in bytes."""

MOST_OF_DISK = 0.1
"""Such a file takes at most this share of the free space, which the history needs."""


def extend_in_file(rows: Tensor, folder: Path) -> Tensor:
    """Return a copy of a tensor with room for as many rows again, mapped from a file that ends with the process.

    The system writes it to disk, and reads it, as memory is scarce or not.

    Args:
        rows: to copy, on the CPU.
        folder: of the file, which has no name.

    Raises:
        OSError: if the disk has too little free space, or the file would be larger than ``FILE_BYTES``.
    """
    size, most = 2 * rows.nbytes, min(FILE_BYTES, int(MOST_OF_DISK * shutil.disk_usage(folder).free))
    if not size or rows.device.type != "cpu":
        return extend_in_memory(rows)
    if size > most:
        raise OSError(errno.ENOSPC, f"a part of them takes {size} bytes, and may take {most} in {folder}")
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size)  # A write to space that the disk does not have ends the process.
        pages = mmap.mmap(file.fileno(), size)
    found = torch.frombuffer(pages, dtype=rows.dtype).view(2 * len(rows), *rows.shape[1:])
    found[: len(rows)] = rows
    return found


_TASKS_PER_READ = 8


TASKS_PER_FILL, BYTES_PER_FILL = 256, 4 * 1024 * 1024
"""Limits of the tasks of an earlier process that are stacked before a meta-step, and of their bytes."""


@dataclass
class _PrefetchSlot:
    uses: int = 0
    task: Task | None = None


class TaskPrefetcher:
    """A thread that reads rounds of a history before they are needed.

    It only saves time: the caller reads rounds that are not prefetched, and gets the error if they cannot be read.

    Args:
        history: to read from.
    """

    def __init__(self, history: History) -> None:
        """Prepare; the first ``prefetch`` starts the thread."""
        self._history = history
        self._changed = threading.Condition()
        self._slots: dict[Hashable, dict[int, _PrefetchSlot]] = {}
        self._reading: tuple[int, ...] = ()
        self._closing = False
        self._thread: threading.Thread | None = None

    def prefetch(self, reader: Hashable, rounds: Iterable[int]) -> None:
        """Prefetch rounds for a reader, in this order; they replace the reader's previous list.

        Args:
            reader: identifies the reader.
            rounds: may be longer than ``MAX_TASKS``; the rest is ignored.
        """
        with self._changed:
            before, now = self._slots.get(reader, {}), dict[int, _PrefetchSlot]()
            for round in islice(rounds, MAX_TASKS):
                slot = now.setdefault(round, _PrefetchSlot())
                slot.uses += 1
                if round in before:
                    slot.task = before[round].task
            self._slots[reader] = now
            if self._thread is None and not self._closing:
                self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def take(self, round: int) -> Task | None:
        """Return the task of a round if it is read or being read; otherwise cancel its prefetch and return None."""
        with self._changed:
            while round in self._reading:
                self._changed.wait()
            for slots in self._slots.values():
                slot = slots.get(round)
                if slot is None:
                    continue
                slot.uses -= 1
                if not slot.uses or slot.task is None:
                    del slots[round]
                    self._changed.notify_all()
                return slot.task
            return None

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while rounds := self._next_rounds():
            try:
                tasks: list[Task | None] = list(self._history.tasks(rounds))
            except Exception:  # raised again in the training thread, where the round is needed
                tasks = [None] * len(rounds)
            with self._changed:
                self._reading = ()
                for slots in self._slots.values():
                    for round, task in zip(rounds, tasks, strict=True):
                        if task is None:
                            slots.pop(round, None)
                        elif round in slots:
                            slots[round].task = task
                self._changed.notify_all()

    def _next_rounds(self) -> tuple[int, ...]:
        with self._changed:
            while not self._closing:
                unread = () if self._bytes() >= MAX_BYTES else tuple(islice(self._unread(), _TASKS_PER_READ))
                if unread:
                    self._reading = unread
                    return unread
                self._changed.wait()
            return ()

    def _unread(self) -> Iterator[int]:
        return (round for slots in self._slots.values() for round, slot in slots.items() if slot.task is None)

    def _bytes(self) -> int:
        tasks = (slot.task for slots in self._slots.values() for slot in slots.values())
        return sum(_count_bytes(task) for task in tasks if task is not None)


def _count_bytes(task: Task) -> int:
    return sum(tensor.nbytes for tensor in tree_leaves(task))


class HistoryBuffer:
    """A ``ReplayBuffer`` over the rounds of a durable history, which stores no second copy of them.

    Tasks of the shape of the first one are also kept as stacked tensors, in memory, and beyond a limit in files. A rank
    without storage receives tasks when they are needed and drops them afterwards. ``waited_seconds`` is the time that
    callers have waited for tasks.

    Args:
        history: to read from; None on a rank without storage.
        device: of the returned tensors.
        rank_group: of the run.
        folder: for files that end with the process; None for no stacked tasks beyond the limit of memory.
    """

    def __init__(
        self,
        history: History | None,
        device: torch.device,
        rank_group: RankGroup = SINGLE_PROCESS,
        folder: Path | None = None,
    ) -> None:
        """Prepare; nothing is read yet."""
        self._history, self._device, self._rank_group = history, device, rank_group
        self._received: dict[int, Task] = {}
        self._prefetcher = None if history is None else TaskPrefetcher(history)
        extend = None if folder is None else partial(extend_in_file, folder=folder)
        self._stack, self._has_all = TaskStack(STACK_BYTES, extend), False
        self._unstacked: Iterator[int] | None = None
        self.waited_seconds = 0.0
        self._ahead: dict[int, Task] = {}
        self._task_bytes = MAX_BYTES  # Of the largest new task that was read last; at first one task is read.
        self._decided, self._sample = 0, np.array([], np.int64)
        self._excluded = np.array([] if history is None else list_forgotten(history.query), np.int64)

    def exclude(self, rounds: Iterable[int]) -> None:
        """Leave out quarantined rounds from now on, in addition to those that are left out already."""
        self._excluded = np.union1d(self._excluded, np.fromiter(rounds, np.int64))
        self._sample = np.setdiff1d(self._sample, self._excluded, assume_unique=True)

    def __getitem__(self, round: int, /) -> Task:
        """Return the task of a round."""
        start_time = time.perf_counter()
        task = self._read(round)
        self.waited_seconds += time.perf_counter() - start_time
        # The history is in host memory.
        return task if self._device.type == "cpu" else map_tensors(lambda tensor: tensor.to(self._device), task)

    def gather(self, rounds: Sequence[int]) -> Sequence[Task]:
        """Return the tasks of rounds, in their order: as rows of stacked tensors, once all of them have been read."""
        self._fill()
        found = self._stack.find(rounds)
        self._has_all = found is not None
        if found is not None:
            return found
        tasks = [self[round] for round in rounds]
        if self._history is not None:
            for round, task in zip(rounds, tasks, strict=True):
                self._stack.add(round, task)
        return tasks

    def _fill(self) -> None:
        """Stack a few more rounds that an earlier process has learned: all at once would take too long."""
        if self._history is None or self._stack.is_full or self._unstacked is None:
            return
        size = self._stack.task_bytes or BYTES_PER_FILL  # At first, the size is unknown.
        chosen = [*islice(self._unstacked, min(TASKS_PER_FILL, max(1, BYTES_PER_FILL // size)))]
        try:
            stacks = self._history.stacks(chosen)
        except (HistoryError, OSError):  # Reading the round where it is needed reports the error.
            return
        for rounds, tasks in stacks:
            self._stack.add_all(rounds, tasks)

    def _read(self, round: int) -> Task:
        if self._history is None or self._prefetcher is None:
            return self._received[round]
        return self._ahead.pop(round, None) or self._prefetcher.take(round) or self._history.tasks([round])[0]

    def read_ahead(self, rounds: range) -> None:
        """Read the tasks of new rounds that come next, a few at once; their number is bounded by their size."""
        if self._history is None or not rounds or rounds.start in self._ahead:
            return
        start_time, self._ahead = time.perf_counter(), {}
        chosen = rounds[: min(_TASKS_PER_READ, max(1, MAX_BYTES // self._task_bytes))]
        with contextlib.suppress(HistoryError, OSError):  # Reading the round that cannot be read reports the error.
            self._ahead = dict(zip(chosen, self._history.tasks(chosen), strict=True))
            self._task_bytes = max(1, *map(_count_bytes, self._ahead.values()))
        self.waited_seconds += time.perf_counter() - start_time

    def prefetch(self, reader: Hashable, rounds: Iterable[int]) -> None:
        """Prefetch the rounds that ``reader`` will need next, in this order.

        Nothing is prefetched after rounds that were all kept as stacked tensors: the next ones will be, too.
        """
        if self._prefetcher is not None and not self._has_all:
            self._prefetcher.prefetch(reader, rounds)

    def close(self) -> None:
        """Stop prefetching."""
        if self._prefetcher is not None:
            self._prefetcher.close()

    def available(self, count: int) -> Sequence[int]:
        """Return which of the first ``count`` rounds are retained and not quarantined; a collective."""
        rank_group = self._rank_group
        decided = last_decision(self._history.query, count) if self._history is not None else 0
        decided = rank_group.broadcast(decided) if rank_group.remote else decided
        if decided != self._decided:
            sample: Any = [] if self._history is None else retained_rounds(self._history.query, decided).tolist()
            sample = np.array(rank_group.broadcast(sample) if rank_group.remote else sample, np.int64)
            self._decided, self._sample = decided, np.setdiff1d(sample, self._excluded, assume_unique=True)
        found: Sequence[int] = range(count)
        if decided or len(self._excluded):
            excluded = self._excluded[np.searchsorted(self._excluded, decided) :]
            found = RetainedRounds(self._sample, decided, count, excluded)
        if self._unstacked is None:
            self._unstacked = map(int, found)
        return found

    def retention_strata(self, rounds: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the stratum of each round, int64: in a stratum, retention keeps each round with the same probability.

        From the decision in force on, every round is kept; below it, the rounds of a source are a stratum.

        Args:
            rounds: in ascending order, int64.
        """
        if self._history is None or not self._decided:
            return np.zeros(len(rounds), np.int64)
        sources = self._history.query("SELECT source FROM rounds WHERE round < ? ORDER BY round", (self._decided,))
        _, labels = np.unique(np.array([source for (source,) in sources], str), return_inverse=True)
        below = rounds[rounds < len(labels)]
        return np.concatenate([labels[below] + 1, np.zeros(len(rounds) - len(below), np.int64)])

    def distribute(self, shares: Sequence[Sequence[int]]) -> None:
        """Send each rank without storage the tasks of its rounds; a collective.

        Args:
            shares: rounds of each rank, by rank.
        """
        rank_group = self._rank_group
        if not rank_group.remote:
            return
        if self._history is None:
            own_rounds = shares[rank_group.rank]
            self._received = dict(zip(own_rounds, map(decode_payload, rank_group.send(None)), strict=True))
        elif rank_group.is_coordinator:
            rank_group.send({rank: self._history.payloads(shares[rank]) for rank in rank_group.remote})

    def add(self, round: int, task: Task) -> None:
        """Keep a copy of the task in memory, if there is room; the history contains it already."""
        if self._history is not None:
            self._stack.add(round, task)
