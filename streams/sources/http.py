"""Receive tasks that clients post to the daemon's own API, ``POST /v1/tasks``; nothing is read."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from streams.spec import TaskSpec
from streams.types import TaskSource


@dataclass(frozen=True)
class Settings:
    """Options of ``[[source]] kind = "http"``; ``[serve]`` sets where the API listens.

    Attributes:
        min_rows: at how many rows that clients have observed of an entity they become a task.
        past_rows: the largest number of an entity's known rows that support such a task or a prediction, the newest
            ones.
        table: the source whose columns name the values in rows of entities, if several sources have columns.
    """

    min_rows: Annotated[int, Ge(2)] = 10
    past_rows: Annotated[int, Ge(1)] = 100
    table: str | None = None


def create_source(settings: Settings, spec: TaskSpec, name: str, seed: int) -> TaskSource | None:
    """Return None, because the API submits each posted task itself."""
    return None
