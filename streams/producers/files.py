"""Write tasks to a folder that a ``files`` source reads."""

import os
from pathlib import Path

from streams.atomic_files import sync_path, write_durably
from streams.producers.errors import SubmitError, check_task_id


class FileProducer:
    """A ``Producer`` that writes each task to its own file, atomically and durably."""

    def __init__(self, folder: str) -> None:
        """Take the ``folder``, which must exist."""
        self._folder = Path(folder)

    def send(self, id: str, body: bytes) -> None:
        """Write <id>.safetensors under a temporary name, sync it, rename it and sync the folder."""
        check_task_id(id)
        part, whole = self._folder / f".{id}.{os.getpid()}.part", self._folder / f"{id}.safetensors"
        try:
            write_durably(part, body)
            part.rename(whole)
            sync_path(self._folder)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise SubmitError(None, "cannot_write", f"{whole}: {error.strerror}") from error

    def close(self) -> None:
        """Do nothing: no file stays open."""
