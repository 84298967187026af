"""A run that was served until it drained, for tests of the files that it left."""

import fcntl
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load

from tests.support.daemon import encode, running_daemon, write_request, write_sinusoid
from trainers.checkpoint import load_latest

ROUNDS = 12


class Finished(NamedTuple):
    """A drained run: its configuration, its folder, and the daemon's last published leader."""

    config: Path
    run: Path
    code: int
    predicted: bytes
    weights: bytes


def finish_once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Finished:
    """Return the finished run; the first test process makes it for all."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "finished"
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "code").exists():
            make_run(folder)
    answers = ((folder / name).read_bytes() for name in ("predicted", "weights"))
    return Finished(folder / "config.toml", folder / "run", int((folder / "code").read_text()), *answers)


def make_run(folder: Path) -> None:
    """Serve a run until it drains, and save next to it the daemon's last responses."""
    with running_daemon(write_sinusoid(folder)) as daemon:
        daemon.submit(*range(ROUNDS))
        daemon.wait_until_learned(ROUNDS)
        daemon.wait_until_compared(ROUNDS)
        support, query = write_request(folder, 50)
        body = {**load(support.read_bytes()), **load(query.read_bytes())}
        (folder / "predicted").write_bytes(daemon.client.post("/v1/adapt", content=encode(body)).content)
        (folder / "weights").write_bytes(daemon.client.get("/v1/weights").content)
        code = daemon.drain()
    assert "Traceback" not in daemon.log.read_text()
    (folder / "code").write_text(str(code))


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def leader_hash(run: Path) -> str:
    """Return the SHA-256 of the state of every learner in the newest checkpoint."""
    newest = load_latest(run / "checkpoints")
    assert newest is not None
    parts = [(learner, name, tensor) for learner, found in newest.learners.items() for name, tensor in found.items()]
    digest = hashlib.sha256(str(newest.rounds).encode())
    for learner, name, tensor in sorted(parts, key=lambda part: part[:2]):
        digest.update(f"{learner} {name} {tuple(tensor.shape)} {tensor.dtype}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()
