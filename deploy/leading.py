"""The run's leader for the sources that follow it."""

import torch

from deploy.adaptation import Adapter
from deploy.config import Config
from online_meta.types import Meta, Task
from streams.history import History
from streams.leading import LeaderContext
from trainers.build import build_module
from trainers.past import HistoryBuffer
from trainers.run_files import RunFiles


def leader_of(config: Config, files: RunFiles, history: History | None) -> LeaderContext:
    """Return the leader as it is published, before that the one that the run begins with; None: no rounds yet."""
    settings = config.trainer()
    adapter = Adapter(settings, files.leader)
    start = adapter.inner.init(dict(build_module(settings.model, settings.seed).named_parameters()))
    buffer = HistoryBuffer(history, torch.device("cpu"))

    def latest_leader() -> tuple[Meta, int]:
        return adapter.leader() if files.leader.exists() else (start, 0)

    def count_rounds() -> int:
        return 0 if history is None else len(history)

    def latest_tasks(count: int) -> list[Task]:
        return [] if history is None else history.tasks(buffer.available(len(history))[-count:])

    return LeaderContext(adapter.inner, config.model.loss == "mse", latest_leader, count_rounds, latest_tasks)
