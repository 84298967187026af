"""Receive tasks that clients post to the daemon's own API, ``POST /v1/tasks``; nothing is read."""

from dataclasses import dataclass

from streams.spec import TaskSpec
from streams.types import TaskSource


@dataclass(frozen=True)
class Settings:
    """Options of ``[[source]] kind = "http"``: none; ``[serve]`` sets where the API listens."""


def create_source(settings: Settings, spec: TaskSpec, name: str, seed: int) -> TaskSource | None:
    """Return None, because the API submits each posted task itself."""
    return None
