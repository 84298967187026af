"""Engines: what holds the meta-parameters and steps them, one kind a file.

A file offers ``build(settings: TrainerSettings, meta: Meta, rank_stats: RankStats | None) -> Engine``, and may offer
``check(settings: EngineSettings)``, which raises ``ValueError`` for settings of [engine] that this kind does not have.
"""

FUNCTION = "build"
