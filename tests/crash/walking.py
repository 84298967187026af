"""Several walkers side by side, and the points that a whole walk visits."""

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
"""After how many first faults of a scenario the next start is harmed; after two of a random one."""
SECONDS = 20
"""At how many points each of those next starts is harmed."""
BY_CHANCE = 200
"""How many points of a random scenario are walked."""


class Walkers:
    """So many walkers, each for one piece of work at a time; a context."""

    def __init__(self, folder: Path, count: int) -> None:
        self.idle: SimpleQueue[Walker] = SimpleQueue()
        self.pool = ThreadPoolExecutor(count)
        self.opened = []
        for number in range(count):
            (place := folder / str(number)).mkdir()
            # What a walker has prepared, or left after a first fault, is read by all: the starts are shared.
            self.opened.append(Walker(place, self.opened[0].starts if self.opened else None))
            self.idle.put(self.opened[-1])

    def __enter__(self) -> "Walkers":
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(cancel_futures=True)
        for walker in self.opened:
            walker.close()

    def use(self, work: Callable[[Walker], Found]) -> Found:
        """Do a piece of work with the next walker that is idle."""
        walker = self.idle.get()
        try:
            return work(walker)
        finally:
            self.idle.put(walker)

    def walk_all(self, points: list[Point]) -> Iterator[tuple[Point, str | None]]:
        """Yield each point as it was walked, with what was wrong there."""

        def visit(point: Point) -> tuple[Point, str | None]:
            try:
                self.use(lambda walker: walk(walker, point))
            except AssertionError as error:
                return point, str(error)
            return point, None

        for done in as_completed([self.pool.submit(visit, point) for point in points]):
            yield done.result()


def choose_points(crew: Walkers, scenarios: list[str], seed: int, lives: int) -> list[Point]:
    """Return all points of the scenarios, some of random ones, and some of the next start after some of them.

    They are shuffled, so that a part of a walk, wherever it is cut off, has seen something of all.
    """
    chance = random.Random(seed)
    points: list[Point] = []
    firsts: list[Point] = []
    for name in [*scenarios, *(f"{RANDOM}{seed}-{number}" for number in range(lives))]:
        found = crew.use(lambda walker, name=name: points_of(walker, name))
        by_chance = name.startswith(RANDOM)
        points += (mine := draw(chance, found, BY_CHANCE) if by_chance else found)
        firsts += draw(chance, mine, 2 if by_chance else FIRSTS)

    def after(first: Point) -> list[Point]:
        try:
            return crew.use(lambda walker: points_of(walker, first.scenario, first))
        except AssertionError:
            return []  # The next start fails, which is found out when ``first`` itself is walked.

    for found in crew.pool.map(after, firsts):
        points += draw(chance, found, SECONDS)
    chance.shuffle(points)
    return points


def draw(chance: random.Random, points: list[Point], most: int) -> list[Point]:
    """Return so many of the points, in their order."""
    return [points[at] for at in sorted(chance.sample(range(len(points)), min(most, len(points))))]
