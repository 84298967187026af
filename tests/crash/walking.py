"""Run several walkers in parallel, and choose the points that a whole walk visits."""

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

from tests.crash.lives import RANDOM
from tests.crash.walker import Point, Walker, points_of, walk

Found = TypeVar("Found")
FIRSTS = 12
"""After how many first faults of a scenario the next start gets a fault; after two of a random scenario."""
SECONDS = 20
"""At how many points each of those next starts gets a fault."""
BY_CHANCE = 200
"""How many points of a random scenario are walked."""


class Walkers:
    """A pool of ``count`` walkers, each for one piece of work at a time. A context manager."""

    def __init__(self, folder: Path, count: int) -> None:
        self.idle: SimpleQueue[Walker] = SimpleQueue()
        self.pool = ThreadPoolExecutor(count)
        self.opened = []
        for number in range(count):
            (place := folder / str(number)).mkdir()
            # The walkers share their starts, so that each preparation and each first fault runs only once.
            self.opened.append(Walker(place, self.opened[0].starts if self.opened else None))
            self.idle.put(self.opened[-1])

    def __enter__(self) -> "Walkers":
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(cancel_futures=True)
        for walker in self.opened:
            walker.close()

    def use(self, work: Callable[[Walker], Found]) -> Found:
        """Run a piece of work with the next idle walker."""
        walker = self.idle.get()
        try:
            return work(walker)
        finally:
            self.idle.put(walker)

    def walk_all(self, points: list[Point]) -> Iterator[tuple[Point, str | None]]:
        """Yield each point once it has been walked, with its failure message or None."""

        def visit(point: Point) -> tuple[Point, str | None]:
            try:
                self.use(lambda walker: walk(walker, point))
            except AssertionError as error:
                return point, str(error)
            return point, None

        for done in as_completed([self.pool.submit(visit, point) for point in points]):
            yield done.result()


def choose_points(walkers: Walkers, scenarios: list[str], seed: int, lives: int) -> list[Point]:
    """Return all points of the scenarios, some of the random scenarios, and some of next starts after a fault.

    The points are shuffled, so that any prefix of a walk covers a bit of everything.
    """
    chance = random.Random(seed)
    points: list[Point] = []
    firsts: list[Point] = []
    for name in [*scenarios, *(f"{RANDOM}{seed}-{number}" for number in range(lives))]:
        found = walkers.use(lambda walker, name=name: points_of(walker, name))
        by_chance = name.startswith(RANDOM)
        points += (selected := draw(chance, found, BY_CHANCE) if by_chance else found)
        firsts += draw(chance, selected, 2 if by_chance else FIRSTS)

    def after(first: Point) -> list[Point]:
        try:
            return walkers.use(lambda walker: points_of(walker, first.scenario, first))
        except AssertionError:
            return []  # The next start fails; the walk of ``first`` itself reports that.

    for found in walkers.pool.map(after, firsts):
        points += draw(chance, found, SECONDS)
    chance.shuffle(points)
    return points


def draw(chance: random.Random, points: list[Point], most: int) -> list[Point]:
    """Return at most ``most`` randomly drawn points, in their original order."""
    return [points[at] for at in sorted(chance.sample(range(len(points)), min(most, len(points))))]
