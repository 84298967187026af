"""Measure how long training waits for its checkpoints, with one after each round."""

import statistics
from pathlib import Path

from streams.formats import wire
from streams.producers import submit
from tests.benchmarks.one_rank import BATCH, SIDE, WAYS
from tests.benchmarks.works import image_task
from tests.support.daemon import free_port, running_daemon
from trainers.journal.jsonl import LineReader

CONFIG = f"""
[run]
path = "{{run}}"
[task]
x_shape = [3, {SIDE}, {SIDE}]
y = "class"
ways = {WAYS}
[model]
build = "trainers.models:conv4"
args = {{{{ channels = 3, size = {SIDE}, ways = {WAYS} }}}}
[inner]
lr = 0.1
[meta]
batch = {BATCH}
[regret]
comparator = []
baselines = []
[checkpoint]
every_rounds = {{every}}
[engine]
kind = "deepspeed"
processes = 2
zero_stage = 2
batching = "loop"
[serve]
port = {{port}}
"""


def time_stalls(rounds: int, folder: Path) -> dict[str, list[float]]:
    """Return the seconds of rounds with and without a checkpoint after each, and the seconds that training waited."""
    found = {}
    for name, every in (("with", 1), ("without", 10_000)):
        config = folder / f"{name}.toml"
        config.write_text(CONFIG.format(run=folder / name, every=every, port=free_port()))
        with running_daemon(config) as daemon:
            for number in range(BATCH + rounds):
                body = wire.encode(image_task(WAYS, 1, 15, number, SIDE))
                submit(daemon.url, f"t{number}", body)
            daemon.wait_until_learned(BATCH + rounds, 600)
        lines = LineReader(folder / name / "rounds.jsonl").refresh()
        found[name] = [
            line["seconds"] for line in lines[BATCH:]
        ]  # Earlier rounds have too few tasks for a whole batch.
        checkpoints = LineReader(folder / name / "checkpoints.jsonl").refresh()
        found["stall"] = found.get("stall") or [line["stall"] for line in checkpoints if line["round"] >= BATCH]
    return found


def compute_share(stalls: dict[str, list[float]]) -> float:
    """Return the share of a round for which training waits."""
    return statistics.median(stalls["stall"]) / statistics.median(stalls["with"])
