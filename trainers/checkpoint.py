"""Write and read checkpoints: shards of safetensors and a JSON manifest with SHA-256 digests; no pickle.

A checkpoint is either complete or invisible to readers.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load, save

from online_meta.tree import copy_aligned
from online_meta.types import Params
from streams.atomic_files import replace_file, sync_path, write_durably

FORMAT = 2
"""Format 1, with one file <learner>.safetensors per learner, can also be read."""
MANIFEST = "manifest.json"
LATEST = "LATEST"
log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used: it is damaged, or has another format version."""


class UnsupportedFormat(CheckpointError):
    """An intact checkpoint has another format version; to fall back to an older one would discard its rounds."""


class Checkpoint(NamedTuple):
    """The state of every learner after ``rounds`` rounds, and the settings that led to it.

    No other state is needed: random numbers are functions of the seed and the round, and the regret ledger is computed
    from the round records. ``erasures`` is how many entities had been erased from the history when it was written.
    """

    rounds: int
    learners: dict[str, Params]
    settings: dict[str, Any]
    erasures: int = 0

    @property
    def leader(self) -> str:
        """The name of the learner that leads: the first one."""
        return next(iter(self.learners))


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> float:
    """Write the checkpoint ``folder``/<rounds>; after a kill it is complete or absent.

    Args:
        folder: of all checkpoints.
        checkpoint: to write.
        keep: number of newest checkpoints to keep; older ones are removed.

    Returns:
        The duration in seconds.

    Raises:
        OSError: if a file cannot be written; earlier checkpoints remain.
    """
    start_time = time.monotonic()
    unfinished = begin_checkpoint(folder, checkpoint.rounds)
    digests = write_shard(unfinished, 0, checkpoint.learners)
    publish_checkpoint(unfinished, checkpoint.rounds, digests, checkpoint.settings, keep, erasures=checkpoint.erasures)
    return time.monotonic() - start_time


def begin_checkpoint(folder: Path, rounds: int) -> Path:
    """Create and return an empty folder for a checkpoint, which readers ignore; remove other unfinished ones.

    Args:
        folder: of all checkpoints.
        rounds: number of rounds that the checkpoint has learned.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*.unfinished"):
        shutil.rmtree(leftover)
    unfinished = folder / f".{rounds}.unfinished"
    unfinished.mkdir()
    return unfinished


def write_shard(unfinished: Path, shard: int, learners: Mapping[str, Params]) -> dict[str, str]:
    """Write one shard of each learner, durably.

    Args:
        unfinished: folder from ``begin_checkpoint``.
        shard: number of the shard.
        learners: tensors of each learner in this shard.

    Returns:
        The SHA-256, in hexadecimal digits, of each file by its name.
    """
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
    erasures: int = 0,
) -> None:
    """Make a checkpoint visible whose shards are written, and remove old ones.

    The manifest is written and fsynced like the shards. Then the folder is renamed, and LATEST is replaced last.

    Args:
        unfinished: folder from ``begin_checkpoint``.
        rounds: number of rounds that the checkpoint has learned.
        digests: SHA-256 of each shard's file.
        settings: of the run.
        keep: number of newest checkpoints to keep.
        pinned: rounds of further checkpoints to keep.
        erasures: how many entities have been erased from the history.
    """
    folder = unfinished.parent
    target = folder / str(rounds)
    manifest = {"format": FORMAT, "rounds": rounds, "sha256": dict(digests), "settings": settings}
    manifest |= {"erasures": erasures} if erasures else {}
    write_durably(unfinished / MANIFEST, json.dumps({**manifest, "manifest": _digest(manifest)}, indent=1).encode())
    sync_path(unfinished)
    if target.exists():  # A run that fell back to an older checkpoint writes this one again.
        shutil.rmtree(target)
    os.rename(unfinished, target)
    sync_path(folder)
    replace_file(folder / LATEST, f"{rounds}\n".encode(), durable=True)
    saved = list_checkpoints(folder)
    kept = [one for one in saved if one <= rounds][-keep:]
    for other in set(saved).difference(kept, pinned):  # A newer one is damaged: the run fell back to one before it.
        shutil.rmtree(folder / str(other))


def list_checkpoints(folder: Path) -> list[int]:
    """Return the rounds that have a checkpoint in ``folder``, ascending; [] if the folder does not exist."""
    if not folder.is_dir():
        return []
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit())


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint and verify every digest.

    Args:
        path: folder of the checkpoint.

    Raises:
        CheckpointError: if a file is missing or damaged; the message names it.
        UnsupportedFormat: if the checkpoint is intact but has an unknown format version.
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
            raise CheckpointError(f"{path / name} is damaged: its SHA-256 differs from the manifest")
        learners.setdefault(_learner_of(name, manifest["format"]), {}).update(copy_aligned(load(data)))
    return Checkpoint(manifest["rounds"], learners, manifest["settings"], manifest.get("erasures", 0))


def _learner_of(file: str, version: int) -> str:
    """Return the name of the learner, which may contain dots, whose tensors are in a file of a checkpoint."""
    name = file.removesuffix(".safetensors")
    return name if version == 1 else name.rpartition(".")[0]


def _read_manifest(file: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    # Every format must store its digest under this key. Otherwise older versions would consider the checkpoint damaged,
    # and fall back to one before it.
    if not isinstance(manifest, dict) or manifest.pop("manifest", None) != _digest(manifest):
        raise CheckpointError(f"{file} is damaged: its content does not match its own SHA-256")
    return manifest


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()


def read_latest_settings(folder: Path) -> dict[str, Any] | None:
    """Return the settings in the newest manifest that can be read; None if there is none."""
    for rounds in reversed(list_checkpoints(folder)):
        with contextlib.suppress(CheckpointError, OSError):
            settings: dict[str, Any] = _read_manifest(folder / str(rounds) / MANIFEST)["settings"]
            return settings
    return None


def list_outdated(folder: Path, erased: Sequence[Collection[int]]) -> list[int]:
    """Return the rounds of the checkpoints that have learned from tasks that were erased after they were written.

    Such a checkpoint comes from a backup. One that cannot be read is left out.

    Args:
        folder: of all checkpoints.
        erased: the rounds of each erasure of the history, in the order in which they were made.
    """
    found = []
    for rounds in list_checkpoints(folder):
        with contextlib.suppress(CheckpointError):
            known = _read_manifest(folder / str(rounds) / MANIFEST).get("erasures", 0)
            if any(round < rounds for gone in erased[known:] for round in gone):
                found.append(rounds)
    return found


def load_latest(folder: Path) -> Checkpoint | None:
    """Return the newest intact checkpoint, or None if there are no checkpoints; damaged ones are logged and skipped.

    Args:
        folder: of all checkpoints.

    Raises:
        CheckpointError: if all checkpoints are damaged.
        UnsupportedFormat: if the newest intact one has an unknown format version.
    """
    rounds = list_checkpoints(folder)
    problem: CheckpointError | None = None
    for newest in reversed(rounds):
        try:
            return load_checkpoint(folder / str(newest))
        except UnsupportedFormat:
            raise
        except CheckpointError as error:
            log.error("skipping the checkpoint of round %d: %s", newest, error)
            problem = problem or error
    if problem is not None:
        raise problem
    return None
