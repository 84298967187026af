"""Random lives: the same seed gives the same life in every run and every process."""

import random
from collections.abc import Callable
from pathlib import Path

from streams.history.history import History
from streams.history.retention import RetentionSettings, compact, subsample
from streams.history.sealing import SealingSettings, evict_payloads, remove_orphans, seal_next
from tests.crash.scenarios import GROUP, Acknowledge, append

STEPS = 9
GROUPS = 3


class TaskSequence:
    """The next tasks: new ones of several sources, in order within each source, and repeated ones."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.next = [GROUP * group for group in range(GROUPS)]
        self.again: list[int] = []

    def batch(self) -> list[int]:
        """Return the numbers of a batch. A task with a position repeats only while it is the last of its source."""
        numbers: list[int] = []
        for _ in range(self.chance.choice([1, 1, 2, 5])):
            if self.again and self.chance.random() < 0.3:
                numbers.append(self.chance.choice(self.again))
                continue
            group = self.chance.randrange(GROUPS)
            number = self.next[group]
            self.next[group] += 1
            latest = {n // GROUP: n for n in self.again if n % 2 == 0}
            self.again = [n for n in self.again if number % 2 or n != latest.get(group)] + [number]
            numbers.append(number)
        return numbers


def make_random_life(seed: str) -> Callable[[Path, Acknowledge], None]:
    """Return a life of commits, sealing, retention and new starts in the order that the seed gives."""

    def play(folder: Path, acknowledge: Acknowledge) -> None:
        chance = random.Random(seed)
        tasks = TaskSequence(chance)
        steps = [
            chance.choice(["append", "append", "seal", "evict", "subsample", "compact", "start"]) for _ in range(STEPS)
        ]
        history = History.open(folder, write=True)
        for step in ["append", *steps]:
            if step == "start":
                history.close()
                history = History.open(folder, write=True)
                remove_orphans(history)
            elif step == "append":
                append(history, tasks.batch(), acknowledge)
            else:
                maintain(history, step, chance)
        history.close()

    return play


def maintain(history: History, step: str, chance: random.Random) -> None:
    """Run one maintenance step, as the daemon does from time to time."""
    if step == "seal":
        seal_next(history, SealingSettings(segment_rounds=chance.randint(1, 4), ledger_bytes=0))
    elif step == "evict":
        evict_payloads(history, chance.choice([0, 20_000]))
    elif step == "subsample":
        subsample(history, RetentionSettings(rounds=chance.randint(1, 6)))
    else:
        compact(history, len(history), 3)
