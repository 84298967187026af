"""Tasks as files in a spool folder: write under another name, then rename to ``<id>.safetensors``, .npz or .arrow.

There is no cursor, on purpose: a file that is renamed in later may have an earlier name and an earlier time than
one that was taken already, so "all after the last name or time" would lose it. After a restart all files are offered
again; the history knows the ids that it has. Files that are kept make each listing as long as there are files;
``processed = "move"`` moves each into ``done/`` once it is durable, or into ``rejected/``.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from streams.arrivals import TaskSource
from streams.sources._spool import Spool
from streams.spec import TaskSpec


@dataclass(frozen=True)
class Settings:
    """Options of ``[[source]] kind = "files"``.

    Attributes:
        folder: where the files appear.
        poll_seconds: how often it is listed.
        max_bytes: a larger file is not read; nor one whose tensors are larger.
        processed: "keep" a file where it is, or "move" it into the folder's ``done/`` or ``rejected/``.
    """

    folder: str
    poll_seconds: Annotated[float, Gt(0)] = 0.5
    max_bytes: Annotated[int, Ge(1)] = 16 * 1024 * 1024
    processed: Literal["keep", "move"] = "keep"


def create_source(settings: Settings, spec: TaskSpec, name: str, seed: int) -> TaskSource | None:
    """Return the stream of the folder's files, in name order per listing."""
    move = settings.processed == "move"
    return Spool(settings.folder, spec, name, settings.poll_seconds, settings.max_bytes, move)
