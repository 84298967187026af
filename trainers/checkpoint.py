"""Checkpoints: complete or invisible; shards of safetensors and a JSON manifest with SHA-256, no pickle."""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load, save

from online_meta.types import Params
from streams.atomic_files import replace_file, sync_path, write_durably

FORMAT = 2
"""Format 1 is read, too: in it each learner is one file, <learner>.safetensors."""
MANIFEST = "manifest.json"
LATEST = "LATEST"
log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used: damaged, or of another format version."""


class UnsupportedFormat(CheckpointError):
    """A whole checkpoint of another format version; going back to an older one would throw its rounds away."""


class Checkpoint(NamedTuple):
    """The state of every learner after ``rounds`` rounds, and the settings that led there.

    That is all: draws are functions of the settings' seed and the round, and the ledger of regret stands at ``rounds``.
    """

    rounds: int
    learners: dict[str, Params]
    settings: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> float:
    """Write ``folder``/<rounds> so that it is whole or absent after any kill; keep the newest ``keep``.

    Returns the seconds it took. Raises ``OSError`` when the disk refuses; the checkpoints before stay.
    """
    start_time = time.monotonic()
    unfinished = begin_checkpoint(folder, checkpoint.rounds)
    digests = write_shard(unfinished, 0, checkpoint.learners)
    publish_checkpoint(unfinished, checkpoint.rounds, digests, checkpoint.settings, keep)
    return time.monotonic() - start_time


def begin_checkpoint(folder: Path, rounds: int) -> Path:
    """Return a new, empty folder for the checkpoint of ``rounds`` rounds, which no reader sees."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*.unfinished"):
        shutil.rmtree(leftover)
    unfinished = folder / f".{rounds}.unfinished"
    unfinished.mkdir()
    return unfinished


def write_shard(unfinished: Path, shard: int, learners: Mapping[str, Params]) -> dict[str, str]:
    """Write each learner's part in this shard, durably; return the SHA-256 of each file by its name."""
    digests = {}
    for name, tensors in learners.items():
        file = f"{name}.{shard}.safetensors"
        data = save({key: value.cpu().contiguous() for key, value in tensors.items()})
        digests[file] = hashlib.sha256(data).hexdigest()
        write_durably(unfinished / file, data)
    return digests


def publish_checkpoint(
    unfinished: Path,
    rounds: int,
    digests: Mapping[str, str],
    settings: Mapping[str, Any],
    keep: int,
    pinned: Collection[int] = (),
) -> None:
    """Make a checkpoint visible whose shards, with these ``digests``, are written; keep ``keep``, and ``pinned``.

    The manifest is written and fsynced like the shards before the folder is renamed; LATEST is renamed last.
    """
    folder = unfinished.parent
    target = folder / str(rounds)
    manifest = {"format": FORMAT, "rounds": rounds, "sha256": dict(digests), "settings": settings}
    write_durably(unfinished / MANIFEST, json.dumps({**manifest, "manifest": _digest(manifest)}, indent=1).encode())
    sync_path(unfinished)
    if target.exists():  # A run that went back to an older checkpoint writes this one again.
        shutil.rmtree(target)
    os.rename(unfinished, target)
    sync_path(folder)
    replace_file(folder / LATEST, f"{rounds}\n".encode(), durable=True)
    saved = list_checkpoints(folder)
    kept = [one for one in saved if one <= rounds][-keep:]
    for other in set(saved).difference(kept, pinned):  # A newer one is damaged: the run went back behind it.
        shutil.rmtree(folder / str(other))


def list_checkpoints(folder: Path) -> list[int]:
    """List the rounds that have a checkpoint, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit())


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint folder and check every digest.

    Raises ``CheckpointError`` that names the file and what is wrong with it, ``UnsupportedFormat`` when nothing is.
    """
    manifest = _read_manifest(path / MANIFEST)
    if manifest["format"] not in (1, FORMAT):
        raise UnsupportedFormat(
            f"{path} has format {manifest['format']}; this online-meta reads formats 1 and {FORMAT}"
        )
    learners: dict[str, Params] = {}
    for name, digest in manifest["sha256"].items():
        try:
            data = (path / name).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path / name} cannot be read: {error}") from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise CheckpointError(f"{path / name} is damaged: its SHA-256 is not that of the manifest")
        learners.setdefault(name.split(".")[0], {}).update(load(data))
    return Checkpoint(manifest["rounds"], learners, manifest["settings"])


def _read_manifest(file: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    # Every format must keep its digest under this name, or older versions take it for damaged and go back behind it.
    if not isinstance(manifest, dict) or manifest.pop("manifest", None) != _digest(manifest):
        raise CheckpointError(f"{file} is damaged: it is not what its own SHA-256 says")
    return manifest


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()


def load_latest(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint that is whole, None where there is none at all.

    A damaged one is logged and the one before it is taken. Raises ``CheckpointError`` when all are damaged,
    ``UnsupportedFormat`` when the newest that is whole was written by another version.
    """
    rounds = list_checkpoints(folder)
    problem: CheckpointError | None = None
    for newest in reversed(rounds):
        try:
            return load_checkpoint(folder / str(newest))
        except UnsupportedFormat:
            raise
        except CheckpointError as error:
            log.error("checkpoint of round %d is passed over: %s", newest, error)
            problem = problem or error
    if problem is not None:
        raise problem
    return None
