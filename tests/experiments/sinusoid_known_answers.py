"""Run 10-shot sinusoid regression by the protocol of Finn et al. (ICML 2017) with every algorithm."""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import click
import torch
from online_meta import over_tasks
from online_meta.batching.plan import unstack
from online_meta.functional.model import model_loss
from online_meta.inner import Inner
from online_meta.meta_optimizer import MetaOptimizer
from online_meta.types import Batch, Meta, Task
from torch import Tensor
from trainers.build import build_module
from trainers.settings import ModelSettings

from tests.experiments.common.algorithms import Algorithm, build_algorithm
from tests.experiments.common.tables import Row, choose_labels, load_row, run_rows, save_row, write_table

NAME = "sinusoid_known_answers"
MODULE = f"tests.experiments.{NAME}"
SHOTS = 10
TEST_TASKS, TEST_QUERIES = 600, 100
CONTEXT = 5
GLOBS = {"all": ("*",), "head": ("5.*",), "body": ("1.*", "3.*"), "context": ("context",)}
KNOWN = {"MAML": 0.67, "Meta-SGD": 0.31}
"""Mean squared errors that a public reimplementation reports for this protocol; ours must be no larger."""

ALGORITHMS = (
    Algorithm("MAML", "Finn et al., 2017"),
    Algorithm("MAML++ multi-step loss", "Antoniou et al., 2019", steps=5, gradient_options={"step_weights": [0.2] * 5}),
    Algorithm("FOMAML", "Finn et al., 2017", gradient="first_order"),
    Algorithm("Reptile", "Nichol et al., 2018", gradient="reptile", lr=0.02, steps=8),
    Algorithm(
        "Reptile, inner Adam",
        "Nichol et al., 2018",
        "adam",
        options={"betas": [0.0, 0.999]},
        gradient="reptile",
        steps=8,
    ),
    Algorithm("ANIL", "Raghu et al., 2020", fast="head"),
    Algorithm("BOIL", "Oh et al., 2021", fast="body"),
    Algorithm("Meta-SGD", "Li et al., 2017", "meta_sgd"),
    Algorithm("Meta-SGD, a rate a layer", "Li et al., 2017", "meta_sgd", options={"per": "layer"}),
    Algorithm(
        "LSLR, a rate a layer and step",
        "Antoniou et al., 2019",
        "meta_sgd",
        options={"per": "layer_and_step", "steps": 5},
        steps=5,
    ),
    Algorithm("T-net", "Lee & Choi, 2018", "t_net"),
    Algorithm("MT-net", "Lee & Choi, 2018", "mt_net", batch=4, how="loop"),
    Algorithm("Meta-Curvature", "Park & Oliva, 2019", "meta_curvature"),
    Algorithm(
        "WarpGrad, linear warps",
        "Flennerhag et al., 2020",
        "t_net",
        gradient="warp_grad",
        gradient_options={"initialisation": "first_order"},
    ),
    Algorithm(
        "iMAML",
        "Rajeswaran et al., 2019",
        "proximal",
        lr=0.005,
        options={"strength": 2.0},
        gradient="implicit",
        gradient_options={"iterations": 1},
        steps=16,
    ),
    Algorithm("inner momentum", "Polyak, 1964", "momentum", lr=0.005, options={"momentum": 0.5}, steps=5),
    Algorithm("inner Adam", "Kingma & Ba, 2015", "adam", options={"betas": [0.0, 0.999]}, steps=5),
    Algorithm("CAVIA", "Zintgraf et al., 2019", "cavia", lr=0.5, fast="context"),
)


def draw_tasks(random: torch.Generator, tasks: int, queries: int = SHOTS) -> Task:
    """Return a stack of sinusoids: amplitude in [0.1, 5], phase in [0, pi], x in [-5, 5]; (tasks, n, 1)."""
    amplitude = 0.1 + 4.9 * torch.rand(tasks, 1, 1, generator=random)
    phase = math.pi * torch.rand(tasks, 1, 1, generator=random)

    def batch(samples: int) -> Batch:
        x = 10 * torch.rand(tasks, samples, 1, generator=random) - 5
        return Batch(x, amplitude * torch.sin(x - phase))

    return Task(batch(SHOTS), batch(queries))


def evaluate(inner: Inner, meta: Meta) -> tuple[float, float]:
    """Return the mean squared error after adaptation over fresh tasks, and its standard error."""
    tasks = unstack(draw_tasks(torch.Generator().manual_seed(2**31), TEST_TASKS, TEST_QUERIES))
    with torch.no_grad():
        errors: Tensor = torch.stack([inner.loss(inner.adapt(meta, task.support), task.query) for task in tasks])
    return float(errors.mean()), float(errors.std() / TEST_TASKS**0.5)


def run_row(algorithm: Algorithm, iterations: int, seed: int, work: Path) -> Row:
    """Meta-train with one algorithm and return its row; a saved row is loaded instead of computed."""
    asked = {**dataclasses.asdict(algorithm), "iterations": iterations, "seed": seed}
    file = work / f"{algorithm.label.lower().replace(' ', '_').replace(',', '')}-{iterations}-{seed}.json"
    if before := load_row(file, asked):
        return before
    torch.set_num_threads(1)
    began = time.monotonic()
    model = {"inputs": 1, "outputs": 1, "context": CONTEXT if algorithm.fast == "context" else 0}
    module = build_module(ModelSettings("trainers.models:mlp", model), seed)
    inner, gradient = build_algorithm(algorithm, model_loss(module, "mse"), GLOBS)
    engine = MetaOptimizer(inner.init(dict(module.named_parameters())), algorithm.optimizer, algorithm.meta_lr, 10.0)
    mean = over_tasks(gradient, algorithm.how, folder=work / "programs")
    random = torch.Generator().manual_seed(seed)
    skipped = 0
    for _ in range(iterations):
        skipped += engine.apply(mean(engine.meta(), draw_tasks(random, algorithm.batch)), 1.0).skipped is not None
    error, spread = evaluate(inner, engine.meta())
    row = {"asked": asked, "error": error, "standard_error": spread, "skipped": skipped}
    row["seconds"] = time.monotonic() - began
    return save_row(file, row)


def render(result: dict[str, Any]) -> str:
    """Return the table as Markdown."""
    about = f"""# Sinusoid regression, 10-shot, by every algorithm

`{result["command"]}`, commit {result["commit"]}.

The protocol of Finn et al. (2017): amplitude 0.1..5, phase 0..pi, x in -5..5; {SHOTS} support points and {SHOTS} query
points; a ReLU network 1-40-40-1; {result["iterations"]:,} meta-steps of Adam with learning rate 1e-3. Mean squared
error after adaptation on {TEST_QUERIES} points of each of {TEST_TASKS} fresh tasks ± its standard error. One seed.
*Known* is the error that a public reimplementation reports; it is met if ours is no larger.

| algorithm | paper | inner loop | meta-gradient | tasks per step | mean squared error | known | seconds |
|---|---|---|---|---|---|---|---|
"""
    return about + "".join(f"| {' | '.join(_format_cells(row))} |\n" for row in result["rows"])


def _format_cells(row: dict[str, Any]) -> list[str]:
    asked = row["asked"]
    options = "".join(f", {key} {value}" for key, value in asked["options"].items())
    adapts = "" if asked["fast"] == "all" else f", {asked['fast']} only"
    known = KNOWN.get(asked["label"])
    return [
        asked["label"],
        asked["paper"],
        f"{asked['rule']}, lr {asked['lr']:g}{options}, {asked['steps']} step{'s' * (asked['steps'] > 1)}{adapts}",
        asked["gradient"] + "".join(f", {key} {value}" for key, value in asked["gradient_options"].items()),
        str(asked["batch"]),
        f"{row['error']:.3f} ± {row['standard_error']:.3f}"
        + f", {row['skipped']} steps skipped" * bool(row["skipped"]),
        "" if known is None else f"{known}: {'met' if row['error'] <= known else 'not met'}",
        f"{row['seconds']:.0f}",
    ]


@click.command()
@click.option("--iterations", default=70_000, show_default=True, help="Meta-steps of each row.")
@click.option("--only", multiple=True, metavar="LABEL", help="The label of a row; may be repeated. All by default.")
@click.option("--seed", default=0, show_default=True)
@click.option("--jobs", default=2, show_default=True, help="Number of parallel rows.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/experiments/sinusoid"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs/results"), show_default=True)
def main(iterations: int, only: tuple[str, ...], seed: int, jobs: int, work: Path, out: Path) -> None:
    """Write sinusoid_known_answers.json and .md into OUT; rows that are finished in WORK are reused."""
    labels = choose_labels(only, [algorithm.label for algorithm in ALGORITHMS])
    work.mkdir(parents=True, exist_ok=True)
    asked = [(algorithm, iterations, seed, work) for algorithm in ALGORITHMS if algorithm.label in labels]
    run_rows(jobs, run_row, asked, lambda rows: write_table(out, NAME, MODULE, iterations, rows, render))
    click.echo((out / f"{NAME}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
