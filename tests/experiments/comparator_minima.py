"""Compare the comparators on a run with long independent searches from the same leader."""

import math
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import click
import streams.sources
import torch
from deploy.config.config import read_config
from online_meta import registry
from online_meta.learners import LearnerContext, MemoryReplayBuffer
from online_meta.learners.ftml import FollowTheMetaLeader
from online_meta.regret.ledger import MAIN_LEARNER, Comparator
from online_meta.types import Meta, Task
from streams.formats import wire
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map
from trainers.build import build_context, build_learners
from trainers.comparators import RefreshRequest, dynamic, hindsight
from trainers.settings import RegretSettings, TrainerSettings

from tests.experiments.common.playing import build_past_context
from tests.experiments.non_stationary.runs import CONFIG, SHARED, STREAMS

SOURCES = {"sinusoid": "sinusoid", "demo": "rainbow_digits"}
"""The source of each run, by the name of its file of settings in ``deploy``."""
REFRESH = {"dynamic": dynamic.refresh, "hindsight": hindsight.refresh}


class Played(NamedTuple):
    """A run that was played: its settings, the tasks that are looked at, and the last leader."""

    settings: TrainerSettings
    tasks: list[Task]
    leader: Meta


class Measured(NamedTuple):
    """A comparator, the leader's own loss on its tasks, the total of the independent search, and the CPU seconds."""

    comparator: Comparator
    leader: float
    independent: float
    seconds: float

    def ratio(self) -> float:
        """Return the comparator's total divided by the independent one."""
        return self.comparator.cumulative_loss / self.independent


def play(run: str, rounds: int, every: int = 1) -> Played:
    """Play ``rounds`` of a run in memory, and keep one in ``every`` of its tasks."""
    settings, tasks = _load(run, rounds)
    learner = build_learners(settings, build_context(settings, MemoryReplayBuffer()))[MAIN_LEARNER]
    assert isinstance(learner, FollowTheMetaLeader)
    for task in tasks:
        learner.score(task)
        learner.learn(task)
    return Played(settings, tasks[::every], learner.engine.meta())


def _load(run: str, rounds: int) -> tuple[TrainerSettings, list[Task]]:
    own = run in STREAMS
    name, options = STREAMS[run] if own else (SOURCES[run], {})
    overrides = (*SHARED, f"regret.dynamic_steps={RegretSettings().dynamic_steps}") if own else ("regret.baselines=[]",)
    config = read_config(CONFIG if own else Path("deploy") / f"{run}.toml", overrides)
    module = registry.load_module(streams.sources, name)
    source = module.create_source(module.Settings(**options), config.task, run, config.run.seed)
    arrivals = (arrival for arrival in source.read(after=None) if arrival is not None)
    return config.trainer(), [wire.decode_payload(arrival.body) for arrival in islice(arrivals, rounds)]


def measure(kind: str, played: Played, steps: int) -> Measured:
    """Refresh a comparator on the tasks, and search for ``steps`` steps of Adam from the leader."""
    context = build_past_context(played.settings, played.tasks)
    began = time.process_time()
    request = RefreshRequest(len(played.tasks), warm_start=played.leader)
    found = REFRESH[kind](context, played.settings.regret, request, None)
    assert found is not None, "nothing stops the search"
    seconds, lr = time.process_time() - began, played.settings.meta.lr
    search = search_each if kind == "dynamic" else search_all
    return Measured(found.comparator, *search(context, played.tasks, played.leader, steps, lr), seconds)


def search_each(
    context: LearnerContext, tasks: Sequence[Task], start: Meta, steps: int, lr: float
) -> tuple[float, float]:
    """Return the sum of the tasks' losses at ``start``, and of the least that plain Adam finds for each on its own."""
    weights = tree_map(lambda value: value.detach().expand(len(tasks), *value.shape).clone(), start)
    gradient = vmap(context.gradient, in_dims=(0, 0))
    stacked = tree_map(lambda *values: torch.stack(values), *tasks)
    optimizer = torch.optim.Adam(_leaves(weights), lr)
    losses = []
    for _ in range(steps + 1):
        found = gradient(weights, stacked)
        losses.append(found.loss.detach())
        _step(optimizer, weights, found.grads)
    return float(losses[0].sum()), float(torch.stack(losses).min(0).values.sum())


def search_all(
    context: LearnerContext, tasks: Sequence[Task], start: Meta, steps: int, lr: float
) -> tuple[float, float]:
    """Return the sum of the tasks' losses at ``start``, and the least that Adam with a falling rate finds."""
    weights = tree_map(lambda value: value.detach().clone(), start)
    gradient = vmap(context.gradient, in_dims=(None, 0))
    stacked = tree_map(lambda *values: torch.stack(values), *tasks)
    optimizer = torch.optim.Adam(_leaves(weights), lr)
    losses = []
    for step in range(steps + 1):
        found = gradient(weights, stacked)
        losses.append(float(found.loss.sum()))
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / (steps + 1))) / 2
        _step(optimizer, weights, tree_map(lambda value: value.mean(0), found.grads))
    return losses[0], min(losses)


def _leaves(meta: Meta) -> list[Tensor]:
    return [value for part in meta for value in part.values()]


def _step(optimizer: torch.optim.Optimizer, weights: Meta, grads: Meta) -> None:
    for value, grad in zip(_leaves(weights), _leaves(grads), strict=True):
        value.grad = grad.detach()
    optimizer.step()


@click.command()
@click.option("--run", type=click.Choice([*SOURCES, *STREAMS]), default="sinusoid", show_default=True)
@click.option("--kind", type=click.Choice([*REFRESH]), default="dynamic", show_default=True)
@click.option("--rounds", default=60, show_default=True, help="Rounds that FTML plays.")
@click.option("--every", default=1, show_default=True, help="Look at one in this many of them.")
@click.option("--steps", default=900, show_default=True, help="Steps of the independent search.")
def main(run: str, kind: str, rounds: int, every: int, steps: int) -> None:
    """Print a comparator's total beside that of an independent search."""
    torch.set_num_threads(1)
    found = measure(kind, play(run, rounds, every), steps)
    comparator = found.comparator
    click.echo(
        f"{run}, {kind}, {comparator.evaluated} tasks: leader {found.leader:.4g}, comparator "
        f"{comparator.cumulative_loss:.4g}, independent {found.independent:.4g}, ratio {found.ratio():.4g}, settled "
        f"{comparator.settled}, gradient norm {comparator.gradient_norm:.2g}, {found.seconds:.0f} s of CPU"
    )


if __name__ == "__main__":
    main()
