"""Read a run folder and continue the run; the results are plain data for JSON."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch

from deploy.checks.run_folder import check_same_run, check_tasks
from deploy.config.config import Config, read_config
from deploy.leader import read_leader
from deploy.processes.comparators import refresh_with_rounds
from online_meta.types import Params
from streams.formats import wire
from streams.history.errors import RoundDiscarded
from streams.history.history import History
from streams.sources.sinusoid import make_task
from streams.types import Record
from tests.support.daemon import wait_for
from trainers.checkpoint import load_checkpoint
from trainers.journal.jsonl import LineReader
from trainers.journal.run_files import RunFiles
from trainers.loop.rounds import open_run, play_rounds
from trainers.loop.run import close_run


def config_of(file: Path, run: Path) -> Config:
    """Read a fixture's configuration for a copy of its run folder."""
    return read_config(file, (f"run.path={run}",))


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of named tensors: names, shapes, dtypes and bytes."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        found.update(f"{name} {[*tensor.shape]} {tensor.dtype} ".encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def read_tasks(folder: Path) -> list[dict[str, Any]]:
    """Return what a history holds for each round: its entry, its payload, its tensors."""
    with History.open(folder, write=False) as history:
        return [_read_task(history, round) for round in range(len(history))]


def _read_task(history: History, round: int) -> dict[str, Any]:
    entry = history.entry(round)
    found = {**entry._asdict(), "digest": entry.digest.hex()}
    assert history.find(entry.id) == round
    try:
        payload, task = history.payload(round), history[round]
    except RoundDiscarded:
        return {**found, "payload": None, "tensors": None}
    tensors = {f"{part}_{name}": v for part, batch in task._asdict().items() for name, v in batch._asdict().items()}
    return {**found, "payload": hashlib.sha256(payload).hexdigest(), "tensors": digest(tensors)}


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """Return the round of a checkpoint and the SHA-256 of each learner's state."""
    checkpoint = load_checkpoint(folder)
    return {"round": checkpoint.rounds, "learners": {n: digest(state) for n, state in checkpoint.learners.items()}}


def read_weights(file: Path) -> dict[str, Any]:
    """Return the round of a published leader, and the SHA-256 of its weights and of its rule's parameters."""
    leader = read_leader(file)
    return {"round": leader.round, "weights": digest(leader.meta.weights), "rule": digest(leader.meta.rule)}


def play(config: Config, files: RunFiles, history: History, rounds: int) -> None:
    """Open a run at its last checkpoint, and play until ``rounds`` rounds are learned."""
    check_tasks(history, config.task, files.history)
    check_same_run(config, files)
    run = open_run(config.trainer(), files, history)
    try:
        assert play_rounds(run, Event(), rounds) == rounds
    finally:
        close_run(run)


def continue_run(config_file: Path, run: Path, more: int) -> dict[str, Any]:
    """Continue a run with ``more`` tasks; return their lines and the leader's weights."""
    config, files = config_of(config_file, run), RunFiles(run)
    with History.open(files.history, write=True) as history:
        first = len(history)
        history.append([_record(t) for t in range(first, first + more)])
        play(config, files, history, first + more)
    leader: Params = read_leader(files.leader).meta.weights
    return {
        "rounds": [line for line in read_rounds(run) if line["round"] >= first],
        "weights": {name: value.flatten().tolist() for name, value in leader.items()},
    }


def read_rounds(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's rounds without their durations."""
    lines = LineReader(RunFiles(run).rounds).refresh()
    return [{key: value for key, value in line.items() if not key.startswith("seconds")} for line in lines]


def _record(t: int) -> Record:
    payload = wire.encode(make_task(0, t, 10, 10))
    return Record(f"sinusoid-{t}", payload, wire.digest(payload), "sinusoid", str(t), 1.0)


def compare(config_file: Path, run: Path) -> list[dict[str, Any]]:
    """Let the comparators of a run cover its new rounds; return their new lines."""
    config, files, stop = config_of(config_file, run), RunFiles(run), Event()
    wanted = len(config.regret.comparator)
    known = len(LineReader(files.comparators).refresh())
    if not wanted:
        return []
    with History.open(files.history, write=False) as history:
        watching = Thread(target=refresh_with_rounds, args=(config.trainer(), files, history, stop))
        watching.start()
        try:
            wait_for(
                "the comparators cover the new rounds",
                lambda: len(LineReader(files.comparators).refresh()) == known + wanted,
                60,
            )
        finally:
            stop.set()
            watching.join()
    lines = LineReader(files.comparators).refresh()[known:]
    return [{key: value for key, value in line.items() if key != "timestamp"} for line in lines]
