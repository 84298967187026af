"""Adapt from a checkpoint, without a daemon."""

from pathlib import Path

import torch
from pydantic import TypeAdapter
from torch import Tensor

from deploy.exits import CONFIG, Stop
from online_meta.regret import LEARNER
from online_meta.types import Batch, Meta
from trainers.build import build_inner, build_loss, build_module
from trainers.checkpoint import CheckpointError, load_checkpoint
from trainers.settings import TrainerSettings


def adapt_from_checkpoint(folder: Path, support: Batch, query_x: Tensor) -> tuple[Tensor, bool]:
    """Return the output of the checkpoint's leader, adapted to ``support``, on ``query_x``, and whether it classifies.

    Raises ``Stop`` (78) for a checkpoint that cannot be read, or tensors that its model does not take.
    """
    try:
        checkpoint = load_checkpoint(folder)
    except CheckpointError as error:
        raise Stop(CONFIG, str(error)) from error
    settings = TypeAdapter(TrainerSettings).validate_python(checkpoint.settings)
    torch.set_num_threads(settings.engine.threads)
    loss = build_loss(settings.model, build_module(settings.model, settings.seed))
    inner = build_inner(settings.inner, loss)
    saved = checkpoint.learners[LEARNER]
    meta = Meta(
        {name.removeprefix("weights."): value for name, value in saved.items() if name.startswith("weights.")},
        {name.removeprefix("rule."): value for name, value in saved.items() if name.startswith("rule.")},
    )
    try:
        with torch.no_grad():
            return loss.output(inner.adapt(meta, support), query_x), settings.model.loss == "cross_entropy"
    except (RuntimeError, ValueError, IndexError) as error:
        raise Stop(CONFIG, f"the model of {folder} does not take these tensors: {error}") from error
