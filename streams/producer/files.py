"""Bring tasks to a folder that a ``files`` source lists."""

import os
import re
from pathlib import Path

from streams.producer.errors import SubmitError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*")


class FileProducer:
    """A ``Producer`` that writes each task as a file of its own, whole and durable under its name or not there."""

    def __init__(self, folder: str) -> None:
        """Write into ``folder``, which is there already."""
        self._folder = Path(folder)

    def send(self, id: str, body: bytes) -> None:
        """Write <id>.safetensors under another name, flush it, rename it, flush the folder."""
        if not _NAME.fullmatch(id):
            raise SubmitError(None, "bad_id", f"the id {id[:80]!r} cannot be a file's name")
        part, whole = self._folder / f".{id}.{os.getpid()}.part", self._folder / f"{id}.safetensors"
        try:
            with open(part, "wb") as file:
                file.write(body)
                file.flush()
                os.fsync(file.fileno())
            part.rename(whole)
            _flush(self._folder)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise SubmitError(None, "cannot_write", f"{whole}: {error.strerror}") from error

    def close(self) -> None:
        """Do nothing: no file stays open."""


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
