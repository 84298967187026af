"""Adapt from a checkpoint, without a daemon."""

from pathlib import Path

import torch
from pydantic import TypeAdapter
from torch import Tensor

from deploy.exits import CONFIG, CommandError
from online_meta.regret import MAIN_LEARNER
from online_meta.types import Batch, Meta
from trainers.build import build_inner, build_loss, build_module
from trainers.checkpoint import MANIFEST, Checkpoint, CheckpointError, list_checkpoints, load_checkpoint
from trainers.settings import TrainerSettings


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint; raises ``CommandError`` (78) that says which ones there are when ``folder`` holds several."""
    rounds = list_checkpoints(folder)
    if rounds and not (folder / MANIFEST).exists():
        choices = ", ".join(str(folder / str(round)) for round in rounds)
        raise CommandError(CONFIG, f"{folder} holds several checkpoints: give one of {choices}")
    try:
        return load_checkpoint(folder)
    except CheckpointError as error:
        raise CommandError(CONFIG, str(error)) from error


def adapt_from_checkpoint(folder: Path, support: Batch, query_x: Tensor) -> tuple[Tensor, bool]:
    """Return the output of the checkpoint's leader, adapted to ``support``, on ``query_x``, and whether it classifies.

    Raises ``CommandError`` (78) for a checkpoint that cannot be read, or tensors that its model does not take.
    """
    checkpoint = open_checkpoint(folder)
    settings = TypeAdapter(TrainerSettings).validate_python(checkpoint.settings)
    torch.set_num_threads(settings.engine.threads)
    try:
        loss = build_loss(settings.model, build_module(settings.model, settings.seed))
        inner = build_inner(settings.inner, loss)
    except ValueError as error:
        raise CommandError(CONFIG, f"the model of {folder} cannot be built here: {error}") from error
    saved = checkpoint.learners[MAIN_LEARNER]
    meta = Meta(
        {name.removeprefix("weights."): value for name, value in saved.items() if name.startswith("weights.")},
        {name.removeprefix("rule."): value for name, value in saved.items() if name.startswith("rule.")},
    )
    try:
        with torch.no_grad():
            return loss.output(inner.adapt(meta, support), query_x), settings.model.loss == "cross_entropy"
    except (RuntimeError, ValueError, IndexError) as error:
        raise CommandError(CONFIG, f"the model of {folder} does not take these tensors: {error}") from error
