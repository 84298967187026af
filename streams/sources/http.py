"""Tasks that are posted to the daemon's own API, ``POST /v1/tasks``: there is nothing to read."""

from dataclasses import dataclass

from streams.spec import TaskSpec
from streams.types import TaskSource


@dataclass(frozen=True)
class Settings:
    """No options; where the API listens is said in ``[serve]``."""


def create_source(settings: Settings, spec: TaskSpec, name: str, seed: int) -> TaskSource | None:
    """Return None: the API hands each posted task to ingest itself."""
    return None
