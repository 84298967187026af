"""``python -m tests.benchmarks.frozen``: the memory of two ranks that learn LoRA, with frozen weights in a file."""

import ctypes
import gc
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import torch

from online_meta.learners import MemoryReplayBuffer
from online_meta.memory import bytes_of
from streams.atomic_files import replace_file
from tests.benchmarks.resident import RETURN_MEMORY, read_kilobytes
from tests.benchmarks.surroundings import describe_machine, read_commit
from tests.benchmarks.works import sequence_task
from tests.support.launch_ranks import places
from trainers.build import build_context, build_engine, build_learner
from trainers.distributed.process_group import join_process_group
from trainers.memory_estimate import estimate_memory
from trainers.settings import (
    EngineSettings,
    InnerSettings,
    MetaSettings,
    ModelSettings,
    RegretSettings,
    TrainerSettings,
)

NAME = "bench_frozen"
RANKS, ROUNDS, LENGTH, FEATURES, SEQUENCES, STEPS = 2, 2, 64, 16, 2, 1
LARGE, SMALL = {"width": 512, "layers": 6}, {"width": 32, "layers": 2}
WAYS = ("whole", "in a file")
RESIDENT, ESTIMATE = 0.6, 0.15


def make_settings(sizes: dict[str, int], folder: str) -> TrainerSettings:
    """Return settings of two ranks that learn the low-rank additions and the head of a transformer."""
    network = {"outputs": 1, "length": LENGTH, "features": FEATURES, "heads": 4, **sizes}
    low_rank = {"build": "trainers.models:transformer", "args": network, "layers": ["body.*"], "rank": 4}
    return TrainerSettings(
        ModelSettings(
            "trainers.models:lora", {**low_rank, "freeze": True, "learned": ["head.*"]}, "mse", recompute=("body.*",)
        ),
        InnerSettings(steps=STEPS, lr=0.01, fast=("*lora*",)),
        MetaSettings(batch=3),
        RegretSettings(baselines=()),
        EngineSettings("deepspeed", RANKS, zero_stage=3, batching="loop", frozen_folder=folder),
    )


def learn(settings: TrainerSettings, ready: Any) -> dict[str, Any]:
    """Learn the rounds as a rank does; call ``ready`` when the model is built; return figures."""
    context = build_context(settings, MemoryReplayBuffer(), engine=settings.engine.kind)
    learner = build_learner(settings, 0, context, lambda own: build_engine(own, own.engine.kind))
    ready()
    scores = []
    for round in range(ROUNDS):
        task = sequence_task(SEQUENCES, LENGTH, FEATURES, round)
        context.buffer.add(round, task)
        scores.append(learner.score(task).loss_after)
        learner.learn(task)
    peak, found = read_kilobytes("VmHWM"), hashlib.sha256(repr(scores).encode())
    for name, value in sorted(learner.save().items()):
        found.update(name.encode() + value.numpy().tobytes())
    return {
        "peak": 1024 * peak,
        "state": found.hexdigest(),
        "base": bytes_of(context.inner.loss.tensors.constants),
        "estimate": estimate_memory(settings, context.inner, context.start, task).peak,
    }


def measure_rank(folder: str) -> None:
    """Print the bytes that learning adds, each way, to a rank that has learned with a small network."""
    torch.set_num_threads(1)
    reset, found = Path("/proc/self/clear_refs"), {}
    with join_process_group(EngineSettings("deepspeed", RANKS)):
        learn(make_settings(SMALL, folder), lambda: None)
        for way, place in ((WAYS[1], folder), (WAYS[0], "")):
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            before = 1024 * read_kilobytes("VmRSS")
            figures = learn(make_settings(LARGE, place), lambda: reset.write_text("5"))
            found[way] = {**figures, "measured": figures["peak"] - before}
        print("PEAK", json.dumps(found), flush=True)
    os._exit(0)  # Do not wait for DeepSpeed's threads.


def measure() -> list[dict[str, Any]]:
    """Return the figures of each rank; raises ``RuntimeError`` with the output of one that fails."""
    with tempfile.TemporaryDirectory() as place:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.benchmarks.frozen", "--folder", place],
                env={**os.environ, **RETURN_MEMORY, **where},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for where in places(RANKS)
        ]
        outputs = [rank.communicate()[0] for rank in ranks]
    lines = [[line for line in output.splitlines() if line.startswith("PEAK")] for output in outputs]
    if not all(lines):
        raise RuntimeError("\n".join(outputs)[-3000:])
    return [json.loads(found[0].removeprefix("PEAK")) for found in lines]


def find_largest(result: dict[str, Any], way: str, figure: str) -> float:
    """Return the largest figure of the ranks."""
    return float(max(rank[way][figure] for rank in result["ranks"]))


def render(result: dict[str, Any]) -> str:
    """Return the table as Markdown."""
    machine, base = result["machine"], result["ranks"][0]["whole"]["base"]
    measured = {way: find_largest(result, way, "measured") for way in WAYS}
    resident = 1 - (measured[WAYS[0]] - measured[WAYS[1]]) / base
    same = len({rank[way]["state"] for rank in result["ranks"] for way in WAYS}) == 1
    text = f"""# Frozen weights in a file

`{result["command"]}`, commit {result["commit"]}; {machine["processor"]}, load {machine["load_before"]:.1f} before.

Two ranks (DeepSpeed, stage 3, one thread each) learn low-rank additions of a transformer with {LARGE["layers"]}
frozen blocks of width {LARGE["width"]}, {base / 1e6:.0f} MB: exact, K = {STEPS}, three tasks a meta-step. *Measured*
is the peak of the resident memory while they learn, above that of a process that has learned with a small network; the
larger of the two ranks. Pages of the file count. *Estimated* is what `online-meta check` estimates, of which the goal
was {ESTIMATE:.0%}. It does not count what operations need within themselves.

| frozen weights | measured | estimated | off by |
|---|---|---|---|
"""
    for way in WAYS:
        estimate = find_largest(result, way, "estimate")
        text += f"| {way} | {measured[way] / 1e6:.1f} MB | {estimate / 1e6:.1f} MB "
        text += f"| {estimate / measured[way] - 1:+.1%} |\n"
    return f"""{text}
Of the frozen weights, {resident:.0%} are resident in a rank ({RESIDENT:.0%} was the goal). Both ranks learn
{"the same bits both ways" if same else "**different bits**"}.
"""


@click.command()
@click.option("--folder", default="", help="Measure one rank with a file in this folder; started by this program.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs/results"), show_default=True)
def main(folder: str, out: Path) -> None:
    """Print and write what two ranks hold."""
    if folder:
        measure_rank(folder)
    result: dict[str, Any] = {"command": "python -m tests.benchmarks.frozen", "commit": read_commit()}
    result |= {"machine": describe_machine(), "ranks": measure()}
    replace_file(out / f"{NAME}.json", json.dumps(result, indent=1).encode(), durable=False)
    replace_file(out / f"{NAME}.md", render(result).encode(), durable=False)
    click.echo(render(result))


if __name__ == "__main__":
    main()
