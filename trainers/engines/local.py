"""The local engine: one process holds all meta-parameters."""

from online_meta.meta_optimizer import MetaOptimizer
from online_meta.types import Engine, Meta
from trainers.distributed.rank_stats import RankStats
from trainers.settings import EngineSettings, TrainerSettings


def check(settings: EngineSettings) -> None:
    """Raise ``ValueError`` for settings that are of the other engines."""
    for key in ("processes", "zero_stage", "offload_optimizer", "nodes"):
        if getattr(settings, key) != getattr(EngineSettings(), key):
            raise ValueError(
                f"{key} = {getattr(settings, key)}: the local engine is one process that shards nothing; "
                "set kind = 'deepspeed'"
            )


def build(settings: TrainerSettings, meta: Meta, rank_stats: RankStats | None = None) -> Engine:
    """Return an engine that steps ``meta`` in this process, by the optimizer of ``settings.meta``; it never waits."""
    return MetaOptimizer(meta, settings.meta.optimizer, settings.meta.lr, settings.meta.clip_norm)
