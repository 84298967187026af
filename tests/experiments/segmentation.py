"""Segment streams without task boundaries online, and measure delay and false alarms against the known changes."""

import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import online_meta.changepoints.detectors
import torch
from online_meta import over_tasks, registry
from online_meta.answers import bind_meta
from online_meta.batching.plan import unstack
from online_meta.changepoints.evaluation import evaluate_segments
from online_meta.changepoints.leader_likelihood import ADAPTATION_SIZES, leader_likelihood, measure_errors
from online_meta.changepoints.likelihoods.gaussian_classes import gaussian_classes
from online_meta.changepoints.likelihoods.linear import linear
from online_meta.changepoints.segments import Likelihood, TaskSegment, segment_samples
from online_meta.functional.model import model_loss
from online_meta.inner import Inner
from online_meta.meta_optimizer import MetaOptimizer
from online_meta.metagrads.exact import exact
from online_meta.rules.meta_sgd import meta_sgd
from online_meta.types import Batch, Task
from safetensors.torch import load_file, save
from streams.atomic_files import replace_file
from torch import Tensor
from trainers.build import build_module
from trainers.settings import ModelSettings

from tests.experiments.common.tables import Row, format_mean, load_row, run_rows, save_row, write_table
from tests.experiments.sinusoid_known_answers import draw_tasks

NAME = "segmentation"
MODULE = f"tests.experiments.{NAME}"
MIN_LENGTH, MEAN_LENGTH, NOISE, TOLERANCE = 10, 50, 0.1, 10
TRAINING = 3_000

Samples = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Way:
    """One row of a table: the stream, the method that cuts it, and the likelihood."""

    stream: str
    method: str
    likelihood: str = "-"
    options: dict[str, Any] = field(default_factory=dict)


HAZARDS = [{"hazard": hazard} for hazard in (0.1, 0.02, 0.002)]
JUMPS = [{"jump": jump} for jump in (0.5, 1.0, 2.0, 4.0)]
WAYS = (
    Way("sinusoid", "count", options={"count": MEAN_LENGTH}),
    *(Way("sinusoid", "run_length", "linear, 50 waves", options) for options in HAZARDS),
    *(Way("sinusoid", "run_length", "linear", options) for options in HAZARDS[1:2]),
    *(Way("sinusoid", "run_length", "the leader's loss", {**options, "hypotheses": 20}) for options in HAZARDS),
    *(Way("sinusoid", "loss_jump", "linear, 50 waves", options) for options in JUMPS),
    *(Way("sinusoid", "loss_jump", "the leader's loss", options) for options in JUMPS),
    Way("classes", "count", options={"count": MEAN_LENGTH}),
    *(Way("classes", "run_length", "gaussian_classes", options) for options in HAZARDS),
    *(Way("classes", "loss_jump", "gaussian_classes", options) for options in JUMPS),
)


def draw_stream(stream: str, seed: int, samples: int) -> tuple[Samples, list[int]]:
    """Return a stream of (x, y), and the index of the first sample of every task except the first.

    A task lasts 10 samples, and continues with probability 39/40 after each further one: 50 samples on average. Tasks
    are the sinusoids of ``sinusoid_known_answers`` with noise of standard deviation 0.1, or three class centres in four
    dimensions, with coordinates ~ N(0, 1.5^2), and noise of standard deviation 1.
    """
    random = torch.Generator().manual_seed(seed)
    found: Samples = []
    changes: list[int] = []
    draw = _draw_sinusoid if stream == "sinusoid" else _draw_classes
    length, task = 0, draw(random)
    for at in range(samples):
        if length >= MIN_LENGTH and float(torch.rand((), generator=random)) < 1 / (MEAN_LENGTH - MIN_LENGTH):
            changes.append(at)
            length, task = 0, draw(random)
        found.append(_draw_sample(stream, task, random))
        length += 1
    return found, changes


def _draw_sinusoid(random: torch.Generator) -> Tensor:
    return torch.tensor([0.1, 0.0]) + torch.tensor([4.9, math.pi]) * torch.rand(2, generator=random)


def _draw_classes(random: torch.Generator) -> Tensor:
    return 1.5 * torch.randn(3, 4, generator=random)


def _draw_sample(stream: str, task: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    if stream == "sinusoid":
        x = 10 * torch.rand(1, generator=random) - 5
        return x, task[0] * torch.sin(x - task[1]) + NOISE * torch.randn(1, generator=random)
    label = torch.randint(3, (), generator=random)
    return task[label] + torch.randn(4, generator=random), label


def train_leader(seed: int, steps: int, work: Path) -> Likelihood:
    """Return the likelihood of a leader that is meta-trained on whole sinusoids to adapt to 1, 2, 5 or 10 samples.

    The leader is saved in ``work``, and loaded from there if it exists.
    """
    module = build_module(ModelSettings("trainers.models:mlp", {"inputs": 1, "outputs": 1}), seed)
    inner = Inner(model_loss(module, "mse"), meta_sgd(lr=0.01), 3)
    engine = MetaOptimizer(inner.init(dict(module.named_parameters())), "adam", 1e-3, 10.0)
    file, random = work / f"leader-{seed}-{steps}.safetensors", torch.Generator().manual_seed(seed)
    if file.exists():
        engine.load(load_file(file))
    else:
        sums = over_tasks(exact(inner), "traced")
        for step in range(steps):
            tasks = draw_tasks(random, 25)
            firsts = Batch(
                *(values[:, : ADAPTATION_SIZES[step % len(ADAPTATION_SIZES)]].contiguous() for values in tasks.support)
            )
            engine.apply(sums(engine.meta(), Task(firsts, tasks.query)), 1.0)
        replace_file(file, save(engine.save()), durable=False)
    judges = unstack(draw_tasks(torch.Generator().manual_seed(2**31 + seed), 100, 20))
    errors = measure_errors(inner, engine.meta(), judges)
    return leader_likelihood(bind_meta(inner, engine.meta()), inner.loss, torch.zeros(1), torch.zeros(1), errors=errors)


def segment_stream(way: Way, stream: Samples, seed: int, training: int, work: Path) -> tuple[list[TaskSegment], float]:
    """Return the segments, and the CPU seconds for segmenting, without the training of a leader."""
    if way.method == "count":
        ends = [*range(way.options["count"], len(stream), way.options["count"]), len(stream)]
        return [TaskSegment(begin, end, end) for begin, end in zip([0, *ends], ends, strict=False)], 0.0
    likelihood = {
        "linear": lambda: linear(1, 1),
        "linear, 50 waves": lambda: linear(1, 1, features=50, scale=1.5, strength=0.01, spread=0.02),
        "gaussian_classes": lambda: gaussian_classes(4, 3),
        "the leader's loss": lambda: train_leader(seed, training, work),
    }[way.likelihood]()
    segmenter = registry.load(online_meta.changepoints.detectors, way.method)(
        likelihood, least=MIN_LENGTH, **way.options
    )
    began = time.process_time()
    return list(segment_samples(segmenter, stream, 1_000)), time.process_time() - began


def run_row(way: Way, seed: int, samples: int, training: int, work: Path) -> Row:
    """Segment one stream in one way and return the metrics; a saved row is loaded instead of computed."""
    asked = {**asdict(way), "seed": seed, "samples": samples, "training": training}
    options = "_".join(f"{name}_{value}" for name, value in way.options.items())
    label = "-".join([way.stream, way.method, way.likelihood, options, str(seed), str(samples), str(training)])
    file = work / f"{label.replace(' ', '_').replace(',', '')}.json"
    if before := load_row(file, asked):
        return before
    torch.set_num_threads(1)
    stream, changes = draw_stream(way.stream, seed, samples)
    segments, seconds = segment_stream(way, stream, seed, training, work)
    found = evaluate_segments(changes, segments, TOLERANCE)
    row = {"asked": asked, **found._asdict(), "delays": [*found.delays], "misplaced": [*found.misplaced]}
    row |= {"mean_delay": found.mean_delay, "max_delay": max(found.delays, default=0)}
    row |= {"missed_share": found.missed / found.changes, "false_per_thousand": found.false_per_thousand}
    return save_row(file, {**row, "microseconds": seconds / samples * 1e6})


def render(result: dict[str, Any]) -> str:
    """Return the table as Markdown: one line for each way, with the mean over its seeds ± standard error."""
    first = result["rows"][0]["asked"]
    about = f"""# Streams without task boundaries, segmented online

`{result["command"]}`, commit {result["commit"]}.

{first["samples"]:,} samples per stream. A task lasts at least {MIN_LENGTH} samples, and {MEAN_LENGTH} on average.
*sinusoid*: amplitude 0.1..5, phase 0..pi, noise {NOISE}. *classes*: three Gaussian classes in four dimensions; each
task has new class centres. A change counts as detected if a reported change lies within {TOLERANCE} samples of it. The
delay is the number of samples of the new task that had arrived when the change was reported; it covers detected changes
only. Purity is the share of samples that belong to the main task of their segment. Mean over the seeds ± standard
error. *The leader's loss* is that of a network 1-40-40-1, meta-trained with {first["training"]:,} steps of exact MAML
(Meta-SGD) on whole tasks. It adapts to the first 1, 2, 5 and 10 samples of each run. It keeps 20 run-length hypotheses;
the others keep 50. Microseconds are CPU time.

| stream | cut by | likelihood | options | delay, mean | longest | missed, % | false in 1,000 | purity | µs a sample |
|---|---|---|---|---|---|---|---|---|---|
"""
    ways: dict[str, list[Row]] = {}
    for row in result["rows"]:
        ways.setdefault(str([row["asked"][key] for key in ("stream", "method", "likelihood", "options")]), []).append(
            row
        )
    return about + "".join(f"| {' | '.join(_format_cells(rows))} |\n" for rows in ways.values())


def _format_cells(rows: list[Row]) -> list[str]:
    asked = rows[0]["asked"]
    options = ", ".join(f"{name} {value:g}" for name, value in asked["options"].items() if name != "hypotheses")
    figures = [
        _format_spread([row["mean_delay"] for row in rows], 1),
        _format_spread([row["max_delay"] for row in rows], 0),
        _format_spread([100 * row["missed_share"] for row in rows], 1),
        _format_spread([row["false_per_thousand"] for row in rows], 1),
        _format_spread([row["purity"] for row in rows], 3),
        _format_spread([row["microseconds"] for row in rows], 0) if asked["method"] != "count" else "-",
    ]
    return [asked["stream"], asked["method"], asked["likelihood"], options, *figures]


def _format_spread(values: list[float], digits: int) -> str:
    return format_mean([value for value in values if math.isfinite(value)], f",.{digits}f")


@click.command()
@click.option("--samples", default=1_000, show_default=True, help="Samples of each stream.")
@click.option("--training", default=TRAINING, show_default=True, help="Meta-steps of the leader.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--jobs", default=2, show_default=True, help="Number of parallel rows.")
@click.option(
    "--work", type=click.Path(path_type=Path), default=Path("runs/experiments/segmentation"), show_default=True
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs/results"), show_default=True)
def main(samples: int, training: int, seeds: int, jobs: int, work: Path, out: Path) -> None:
    """Write segmentation.json and .md into OUT; rows that are finished in WORK are reused."""
    work.mkdir(parents=True, exist_ok=True)
    asked = [(way, seed, samples, training, work) for way in WAYS for seed in range(seeds)]
    run_rows(jobs, run_row, asked, lambda rows: write_table(out, NAME, MODULE, samples, rows, render))
    click.echo((out / f"{NAME}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
