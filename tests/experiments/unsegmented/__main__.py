"""Run a leader with random initial weights on streams without task boundaries: how soon it detects them."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from online_meta.answers import bind_meta
from online_meta.batching.plan import ExecutionPlan, signature_of, unstack
from online_meta.changepoints.detectors.run_length import run_length
from online_meta.changepoints.evaluation import evaluate_blocks
from online_meta.changepoints.leader_likelihood import ADAPTATION_SIZES, leader_likelihood
from online_meta.changepoints.likelihoods.linear import linear
from online_meta.changepoints.segments import Likelihood, Segmenter, TaskSegment, segment_adaptively
from online_meta.changepoints.task_free import estimate_errors, make_task, play_task_free
from online_meta.functional.model import model_loss
from online_meta.inner import Inner
from online_meta.learners.ftml import FollowTheMetaLeader
from online_meta.meta_optimizer import MetaOptimizer
from online_meta.metagrads.exact import exact
from online_meta.regret.scoring import truncate_support
from online_meta.rules.meta_sgd import meta_sgd
from online_meta.tree import add, scale
from online_meta.types import Meta, MetaGrad, MetaGradient, Score, Task
from tests.experiments.common.tables import Row, load_row, run_rows, save_row, write_table
from tests.experiments.segmentation import MEAN_LENGTH, MIN_LENGTH, TOLERANCE, Samples, draw_stream
from tests.experiments.sinusoid_known_answers import draw_tasks
from tests.experiments.unsegmented.daemon import segment_with_source
from tests.experiments.unsegmented.page import BLOCK, DAEMON, NAME, WAYS, render
from trainers.build import build_module
from trainers.settings import ModelSettings

FRESH = 100
OPTIONS: dict[str, Any] = {"hazard": 0.002, "least": MIN_LENGTH, "hypotheses": 10}
BATCH, STEPS, LR, WINDOW = 25, 10, 3e-3, 20
HOW = "traced"


class Report(NamedTuple):
    """A reported segment, and the scores of the tasks that were learned by then."""

    segment: TaskSegment
    scores: list[Score]


def build_leader(seed: int, *, plain: bool = False) -> FollowTheMetaLeader:
    """Return a learner with a random network 1-40-40-1 and three inner steps of Meta-SGD.

    It learns to adapt to prefixes of its tasks or, if ``plain``, to their whole support sets of any size.
    """
    module = build_module(ModelSettings("trainers.models:mlp", {"inputs": 1, "outputs": 1}), seed)
    inner = Inner(model_loss(module, "mse"), meta_sgd(lr=0.01), 3)
    engine = MetaOptimizer(inner.init(dict(module.named_parameters())), "adam", LR, 10.0)
    gradient = exact(inner) if plain else average_over_prefixes(exact(inner), ADAPTATION_SIZES)
    learner = FollowTheMetaLeader(inner, gradient, engine, batch=BATCH, steps_per_round=STEPS, seed=seed)
    if plain:
        return learner
    stream, _ = draw_stream("sinusoid", seed, 2 * max(ADAPTATION_SIZES))
    shapes = [make_task(stream[: 2 * size]) for size in ADAPTATION_SIZES if 2 * size >= MIN_LENGTH]
    learner.task_sum.follow(ExecutionPlan(HOW, BATCH, signature_of(task)) for task in shapes if task is not None)
    return learner


def average_over_prefixes(gradient: MetaGradient, sizes: Sequence[int]) -> MetaGradient:
    """Return the mean meta-gradient over prefixes of the support set, whose lengths are in ``sizes``."""

    def mean_over_prefixes(meta: Meta, task: Task) -> MetaGrad:
        shorter = [gradient(meta, truncate_support(task, size)) for size in sizes if size <= len(task.support.x)]
        found = shorter[0]
        for share in shorter[1:]:
            found = add(found, share)
        return scale(found, 1 / len(shorter))

    return mean_over_prefixes


def play(way: str, learner: FollowTheMetaLeader, stream: Samples, changes: Sequence[int]) -> Iterator[Report]:
    """Run a learner on the stream in one of ``WAYS``."""
    if way == "true boundaries":
        yield from _play_true_boundaries(learner, stream, [*changes, len(stream)])
        return
    if way == DAEMON:
        for segment, task in segment_with_source(learner, stream, "run_length", OPTIONS):
            yield Report(segment, [learner.score(task)])
            learner.learn(task)
        return
    never = Segmenter(dict, lambda memory, x, y: memory, lambda memory: None)
    waves = linear(1, 1, features=50, scale=1.5, strength=0.01, spread=0.02)
    segmenters: dict[str, Callable[[Likelihood], Segmenter]] = {
        "its own cuts": partial(run_length, **OPTIONS),
        "cuts by count": lambda likelihood: never,
        "cuts by linear, 50 waves": lambda likelihood: run_length(waves, **OPTIONS),
    }
    max_samples = MEAN_LENGTH if way == "cuts by count" else 1_000
    for segment, score in play_task_free(learner, segmenters[way], stream, window=WINDOW, max_samples=max_samples):
        yield Report(segment, [] if score is None else [score])


def _play_true_boundaries(learner: FollowTheMetaLeader, stream: Samples, ends: list[int]) -> Iterator[Report]:
    """Learn the true tasks, each after its last sample; the leader's segmentation is only recorded."""
    scores: list[Score] = []
    begin, left = 0, list(ends)

    def renew() -> Segmenter:
        errors, believe = estimate_errors(scores[-WINDOW:]), bind_meta(learner.inner, learner.engine.meta())
        return run_length(leader_likelihood(believe, learner.inner.loss, *stream[0], errors=errors), **OPTIONS)

    for segment in segment_adaptively(renew, stream, 1_000):
        report = Report(segment, [])
        while left and left[0] <= segment.detected_at:
            task = make_task(stream[begin : left[0]])
            begin = left.pop(0)
            if task is not None:
                report.scores.append(learner.score(task, ADAPTATION_SIZES))
                learner.learn(task)
        scores += report.scores
        yield report


def score_fresh_tasks(learner: FollowTheMetaLeader, seed: int) -> float:
    """Return the mean loss on fresh whole noise-free tasks, after adaptation to ten samples of each."""
    tasks = unstack(draw_tasks(torch.Generator().manual_seed(2**31 + seed), FRESH, 20))
    meta, inner = learner.engine.meta(), learner.inner
    with torch.no_grad():
        return sum(float(inner.loss(inner.adapt(meta, task.support), task.query)) for task in tasks) / FRESH


def run_row(way: str, seed: int, samples: int, work: Path) -> Row:
    """Run one stream in one way and return the metrics of its blocks; a saved row is loaded instead of computed."""
    asked = {"way": way, "seed": seed, "samples": samples}
    file = work / f"{way.replace(' ', '_').replace(',', '')}-{seed}-{samples}.json"
    if before := load_row(file, asked):
        return before
    torch.set_num_threads(1)
    began = time.process_time()
    stream, changes = draw_stream("sinusoid", seed, samples)
    learner = build_leader(seed, plain=way == DAEMON)
    segments: list[TaskSegment] = []
    losses: list[list[float]] = [[] for _ in range(0, samples, BLOCK)]
    fresh: list[float] = []
    for segment, scores in play(way, learner, stream, changes):
        segments.append(segment)
        losses[(segment.detected_at - 1) // BLOCK] += [score.loss_after for score in scores]
        while len(fresh) < segment.detected_at // BLOCK:
            fresh.append(score_fresh_tasks(learner, seed))
    found = evaluate_blocks(changes, segments, BLOCK, TOLERANCE)
    blocks = [
        {**block._asdict(), "losses": lost, "fresh": loss}
        for block, lost, loss in zip(found, losses, fresh, strict=True)
    ]
    seconds = time.process_time() - began
    return save_row(file, {"asked": asked, "blocks": blocks, "rounds": learner.round, "seconds": seconds})


@click.command()
@click.option("--blocks", default=6, show_default=True, help=f"Blocks of {BLOCK} samples in each stream.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--jobs", default=2, show_default=True, help="Number of parallel rows.")
@click.option(
    "--work", type=click.Path(path_type=Path), default=Path("runs/experiments/unsegmented"), show_default=True
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs/results"), show_default=True)
def main(blocks: int, seeds: int, jobs: int, work: Path, out: Path) -> None:
    """Write unsegmented.json and .md into OUT; rows that are finished in WORK are reused."""
    work.mkdir(parents=True, exist_ok=True)
    asked = [(way, seed, blocks * BLOCK, work) for seed in range(seeds) for way in WAYS]
    run_rows(jobs, run_row, asked, lambda rows: write_table(out, NAME, __package__, blocks * BLOCK, rows, render))
    click.echo((out / f"{NAME}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
