"""Runs on filtered glyphs: what plays, with which settings, and the row of one run."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

import torch
from online_meta.batches import empty_like, only_tensor
from online_meta.learners.dp_mixture import DirichletProcessMixture, MixtureOptions
from online_meta.prediction import accuracy_of_prediction
from online_meta.regret.calibration import add, expected_calibration_error
from online_meta.regret.ledger import MAIN_LEARNER
from online_meta.types import Learner, Score, Task
from tests.experiments.common.playing import play_stream
from tests.experiments.common.tables import Row, load_row, save_row
from tests.experiments.filtered_glyphs.filters import FILTERS
from tests.experiments.filtered_glyphs.streams import SIZE, WAYS, Filtered, make_stream
from tests.experiments.glyphs.tasks import load_letters
from trainers.settings import (
    EngineSettings,
    InnerSettings,
    MetaSettings,
    ModelSettings,
    RegretSettings,
    TrainerSettings,
)

HIDDEN = (64, 64)
INNER_STEPS = 3
STEPS, BATCH = 2, 4
"""Meta-steps after each round, of each component of a mixture, and past tasks in each of them."""
MOST = 3
"""Components of the mixture at most."""
BATCHING: Literal["loop", "traced"] = "traced"
ROUNDS = 160


@dataclass(frozen=True)
class Contestant:
    """A learner of the table.

    Attributes:
        title: its name on the page.
        kind: which of the learners it is.
        options: options of this learner.
        inner_lr: step size of the inner loop.
        meta_lr: rate of Adam in the outer loop.
        steps: meta-steps after each round.
        by_filter: whether each filter has a learner of its own, to which its tasks are given.
    """

    title: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    inner_lr: float = 0.3
    meta_lr: float = 0.003
    steps: int = STEPS
    by_filter: bool = False


MIXTURE = Contestant("mixture", "dp_mixture", {"concentration": 10.0, "temperature": 0.3, "most": MOST})
SINGLE = Contestant("one initialisation", MAIN_LEARNER)
SCRATCH = Contestant("from scratch", "from_scratch", {"steps": 20, "lr": 0.003})
CONTESTANTS = {
    "dp_mixture": MIXTURE,
    "ftml": SINGLE,
    "ftml_large_steps": replace(SINGLE, title="one initialisation, inner steps of size 1", inner_lr=1.0),
    "ftml_more_steps": replace(SINGLE, title=f"one initialisation, {MOST * STEPS} meta-steps", steps=MOST * STEPS),
    "ftml_by_filter": replace(
        SINGLE, title="one initialisation for each filter, which is known", steps=MOST * STEPS, by_filter=True
    ),
    "from_scratch": SCRATCH,
}
"""The learners of the table, by name."""


class Entry(NamedTuple):
    """One run: the stream, the learner, the seed and the number of rounds."""

    stream: str
    name: str
    seed: int
    rounds: int


class Played(NamedTuple):
    """A round: accuracy before adaptation, the score, CPU seconds, and the component that the task was given to."""

    before: float
    score: Score
    seconds: float
    component: int | None


def make_settings(contestant: Contestant, seed: int) -> TrainerSettings:
    """Return the settings of a run."""
    others = () if contestant.kind == MAIN_LEARNER else (contestant.kind,)
    return TrainerSettings(
        ModelSettings("trainers.models:mlp", {"inputs": SIZE * SIZE, "outputs": WAYS, "hidden": HIDDEN}),
        InnerSettings(steps=INNER_STEPS, lr=contestant.inner_lr),
        MetaSettings(lr=contestant.meta_lr, steps_per_round=contestant.steps, batch=BATCH),
        regret=RegretSettings(
            comparator=(), baselines=others, options={contestant.kind: contestant.options}, baseline_optimizer="meta"
        ),
        engine=EngineSettings(batching=BATCHING, threads=1),
        seed=seed,
    )


def find_component(before: Sequence[float], after: Sequence[float], horizon: float) -> int:
    """Return the component of a mixture that has the largest share of a task that was learned.

    Args:
        before: the discounted numbers of tasks of all components before the round.
        after: those after it: the old ones times 1 - 1 / horizon, plus the shares of the task.
        horizon: the rounds of the discount.
    """
    shares = [now - (1 - 1 / horizon) * old for old, now in zip(before, after, strict=True)]
    return shares.index(max(shares))


def play(contestant: Contestant, seed: int, tasks: Sequence[Task], programs: Path) -> Iterator[Played]:
    """Let a learner play tasks, each of which is scored before it is learned, and yield the rounds."""
    before = 0.0
    counts: Sequence[float] = ()

    def look(learner: Learner, task: Task) -> None:
        nonlocal before, counts
        with torch.no_grad():
            found = learner.answers(learner.state(), empty_like(task.support), task.query.x)[""]
            before = float(accuracy_of_prediction(found, task.query.y))
        counts = learner.counts if isinstance(learner, DirichletProcessMixture) else ()

    settings = make_settings(contestant, seed)
    for learner, score, seconds in play_stream(settings, contestant.kind, tasks, programs, on_task=look):
        component = None
        if isinstance(learner, DirichletProcessMixture):
            component = find_component(counts, learner.counts, MixtureOptions(**contestant.options).horizon)
        yield Played(before, score, seconds, component)


def play_by_filter(contestant: Contestant, seed: int, stream: Sequence[Filtered], programs: Path) -> dict[int, Played]:
    """Return the rounds by number; with ``by_filter``, each filter's tasks are played by a learner of their own."""
    found: dict[int, Played] = {}
    for name in FILTERS if contestant.by_filter else [""]:
        own = [t for t, one in enumerate(stream) if name in ("", one.filter)]
        found |= dict(zip(own, play(contestant, seed, [stream[t].task for t in own], programs), strict=True))
    return found


def run(entry: Entry, contestant: Contestant, work: Path, fonts: Path) -> Row:
    """Return the row of one run; a saved row of the same configuration is loaded instead of computed.

    The row has means over the rounds, also by the parts of the stream: accuracies before and after adaptation, the
    negative log-likelihood in nats and the expected calibration error. Of a mixture it has the number of components
    and the adjusted Rand index of components and filters.
    """
    settings = asdict(make_settings(contestant, entry.seed))
    asked = {**entry._asdict(), "title": contestant.title, "by_filter": contestant.by_filter, "settings": settings}
    file = work / f"{entry.stream}-{entry.name}-{entry.seed}.json"
    if before := load_row(file, asked):
        return before
    letters = load_letters(fonts, work / "letters.safetensors").train
    stream = make_stream(letters, entry.stream, entry.seed, entry.rounds)
    by_round = play_by_filter(contestant, entry.seed, stream, work / "programs")
    played = [by_round[t] for t in range(entry.rounds)]
    by_part: dict[str, list[Played]] = {}
    for one, task in zip(played, stream, strict=True):
        by_part.setdefault(task.part, []).append(one)
    filters = [one.filter for one in stream]
    return save_row(
        file,
        {
            "asked": asked,
            **summarise(played),
            "parts": {part: summarise(own) for part, own in by_part.items()},
            **compare_clusters([one.component for one in played], filters),
            "seconds": sum(one.seconds for one in played),
            "drawn": {
                "after": [round(one.score.accuracy or 0.0, 4) for one in played],
                "components": [one.component for one in played],
                "filters": filters,
                "glyphs": draw_glyphs(stream[0].task) if stream[0].filter == "plain" else None,
            },
        },
    )


def summarise(played: Sequence[Played]) -> dict[str, float]:
    """Return means over rounds: accuracy before and after, nats, and the calibration error of all rounds together."""
    counts = [one.score.calibration for one in played if one.score.calibration is not None]
    return {
        "before": fmean(one.before for one in played),
        "after": fmean(one.score.accuracy or 0.0 for one in played),
        "nll": fmean(one.score.nll or 0.0 for one in played),
        "ece": expected_calibration_error(add(*counts)),
    }


def compare_clusters(components: Sequence[int | None], filters: Sequence[str]) -> dict[str, float | int | None]:
    """Return the number of components, and their agreement with the filters: over all rounds, and over the last half.

    The adjusted Rand index is 1 for the same clusters, and 0 on average for random ones (Hubert & Arabie, 1985).
    """
    from sklearn.metrics import adjusted_rand_score  # type: ignore[import-untyped]

    if None in components:
        return {"clusters": None, "rand": None, "rand_of_last_half": None}
    half = len(components) // 2
    return {
        "clusters": len({*components}),
        "rand": float(adjusted_rand_score(filters, components)),
        "rand_of_last_half": float(adjusted_rand_score(filters[half:], components[half:])),
    }


def draw_glyphs(task: Task) -> dict[str, list[list[float]]]:
    """Return the first query image of a plain task under each filter."""
    image = only_tensor(task.query.x)[:1]
    return {name: change(image)[0, 0].tolist() for name, change in FILTERS.items()}
