"""The local engine: one process holds all meta-parameters."""

from online_meta.meta_optimizer import MetaOptimizer
from online_meta.types import Engine, Meta
from trainers.settings import TrainerSettings


def build(settings: TrainerSettings, meta: Meta) -> Engine:
    """Return an engine that steps ``meta`` in this process, by the optimizer of ``settings.meta``."""
    return MetaOptimizer(meta, settings.meta.optimizer, settings.meta.lr, settings.meta.clip_norm)
