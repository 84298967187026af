"""The local engine: one process holds and steps all meta-parameters."""

from online_meta.meta_optimizer import MetaOptimizer
from online_meta.types import Engine, Meta
from trainers.distributed.rank_stats import RankStats
from trainers.settings import EngineSettings, TrainerSettings


def check(settings: EngineSettings) -> None:
    """Raise ``ValueError`` for settings that only other engines support."""
    for key in ("processes", "zero_stage", "offload_optimizer", "nodes"):
        if getattr(settings, key) != getattr(EngineSettings(), key):
            raise ValueError(
                f"{key} = {getattr(settings, key)}: the local engine is a single process without shards; "
                "set kind = 'deepspeed'"
            )


def build(settings: TrainerSettings, meta: Meta, rank_stats: RankStats | None = None) -> Engine:
    """Return an engine that steps meta-parameters in this process.

    Args:
        settings: of the run; ``settings.meta`` names the optimizer.
        meta: initial meta-parameters.
        rank_stats: unused, because a single process never waits for other ranks.
    """
    own = settings.meta
    return MetaOptimizer(meta, own.optimizer, own.lr, own.clip_norm, own.optimizer_options)
