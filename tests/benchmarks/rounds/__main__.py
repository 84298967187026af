"""``python -m tests.benchmarks.rounds``: measure rounds, and write bench_rounds.json, .md and .png after each part."""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from deploy.processes.child import keep_freed_memory
from streams.atomic_files import replace_file
from tests.benchmarks.rounds.page import Figure, draw, render
from tests.benchmarks.rounds.parts import (
    GAMES,
    QUICK,
    TITLES,
    Part,
    Scale,
    Setting,
    measure_draws,
    measure_first_rounds,
    measure_kernels,
    measure_late_rounds,
    measure_pool,
    measure_ranks,
    measure_rounds,
    measure_sizes,
)
from tests.benchmarks.surroundings import bind_to_one_core, describe_machine, log_progress, read_commit, read_versions

NAME = "bench_rounds"
RANKS = "ranks"
PARTS: dict[str, tuple[float, Callable[[float, Setting], Part]]] = {
    RANKS: (0.6, measure_ranks),
    "rounds_k1": (1.3, partial(measure_rounds, "k1")),
    "rounds_k5": (0.8, partial(measure_rounds, "k5")),
    "pool_k1": (3.0, partial(measure_pool, "sinusoid", GAMES["k1"], TITLES["k1"])),
    "pool_k5": (3.0, partial(measure_pool, "sinusoid", GAMES["k5"], TITLES["k5"])),
    "pool_conv4": (1.2, partial(measure_pool, "conv4", (), "Conv4, 5-way 1-shot")),
    "draws_k5": (1.5, partial(measure_draws, "sinusoid", GAMES["k5"], TITLES["k5"])),
    "draws_conv4": (1.15, partial(measure_draws, "conv4", (), "Conv4, 5-way 1-shot")),
    "kernels": (0.08, measure_kernels),
    "first_k1": (2.5, partial(measure_first_rounds, "k1")),
    "first_k5": (4.0, partial(measure_first_rounds, "k5")),
    "late": (1.1, measure_late_rounds),
    "sizes": (1.5, measure_sizes),
}
"""The parts with their goals. Ranks have several cores and come first; the others are bound to one."""
OWN_PYTHON = Path(".venv/bin/python")


def measure(name: str, scale: Scale, python: str) -> Part:
    """Return the result of a part; one that fails has the reason in place of its figures."""
    log_progress(name)
    keep_freed_memory()  # as the trainer's process does
    if name != RANKS:
        bind_to_one_core()
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bench-rounds-") as folder:
        setting = Setting(scale, Path(folder), lambda what: log_progress(f"{name}: {what}"), python)
        goal, function = PARTS[name]
        try:
            return function(goal, setting)
        except Exception as error:  # An error of one part does not stop the others.
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            figures = [Figure(name, None, goal, at_least=name == RANKS)._asdict()]
            return {"title": name, "about": [f"Not measured: {reason}."], "rows": [], "figures": figures}


@click.command()
@click.option("--only", type=click.Choice([*PARTS]), multiple=True, help="A part; may be repeated. All by default.")
@click.option("--quick", is_flag=True, help="Few rounds, to see that everything works; the figures mean little.")
@click.option(
    "--python",
    default=str(OWN_PYTHON) if OWN_PYTHON.exists() else sys.executable,
    show_default=True,
    help="An interpreter with DeepSpeed, for several ranks.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help=f"The output folder; by default docs/results, or runs/{NAME} with --only or --quick.",
)
def main(only: tuple[str, ...], quick: bool, python: str, out: Path | None) -> None:
    """Print and write the times of whole rounds next to plain JAX, and which goals hold."""
    out = out or Path(f"runs/{NAME}" if only or quick else "docs/results")
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    about: dict[str, Any] = {
        "command": " ".join(["python -m tests.benchmarks.rounds", *sys.argv[1:]]),
        "commit": read_commit(),
        "machine": describe_machine(),
        "versions": {name: version for name, version in read_versions().items() if name in ("torch", "jax", "jaxlib")},
        "plot": f"{NAME}.png",
        "quick": quick,
    }
    result: dict[str, Any] = {"about": about, "parts": {}}
    for name in (name for name in PARTS if name in (only or PARTS)):
        result["parts"][name] = measure(name, QUICK if quick else Scale(), python)
        about["wall_seconds"] = time.monotonic() - began
        replace_file(out / f"{NAME}.json", json.dumps(result, indent=1).encode(), durable=False)
        replace_file(out / f"{NAME}.md", render(result).encode(), durable=False)
        replace_file(out / f"{NAME}.png", draw(result), durable=False)
    click.echo((out / f"{NAME}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
