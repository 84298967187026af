"""Tasks are read before they are asked for, in a thread beside training."""

import threading
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from online_meta.types import Task
from streams.history import History

MAX_TASKS, MAX_BYTES = 256, 64 * 1024 * 1024
"""How many tasks are read ahead for one reader, and with how many bytes for all together (and what is being read)."""

_TASKS_PER_READ = 8


@dataclass
class _PrefetchSlot:
    uses: int = 0
    task: Task | None = None


class TaskPrefetcher:
    """Reads rounds of a history that will be asked for.

    It only ever saves time: what it has not read, or could not read, is left to who asks, to whom it then fails.
    """

    def __init__(self, history: History) -> None:
        """Read from ``history``; the thread begins with the first rounds that are expected."""
        self._history = history
        self._changed = threading.Condition()
        self._slots: dict[Hashable, dict[int, _PrefetchSlot]] = {}
        self._reading: tuple[int, ...] = ()
        self._closing = False
        self._thread: threading.Thread | None = None

    def prefetch(self, reader: Hashable, rounds: Iterable[int]) -> None:
        """Read ``rounds``, in this order, for one of those who ask; what it was expected to ask before is forgotten."""
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
        """Return the task of a round if it has been read, or is being read; else it is not read any more."""
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
            except Exception:  # raised anew where the round is asked for, in the training thread
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
        return sum(tensor.nbytes for task in tasks if task is not None for batch in task for tensor in batch)
