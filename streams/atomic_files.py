"""Write files atomically and durably, so that a power loss never leaves a partial file."""

import os
from pathlib import Path

TEMP_SUFFIX = ".new"
"""The suffix of a file that is still being written."""


def sync_path(path: Path) -> None:
    """Sync the content of a file, or the names in a folder, to disk; raise ``OSError`` if that fails."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, data: bytes) -> None:
    """Write a file and sync its content to disk; its name becomes durable by ``sync_path`` of the folder."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes, *, durable: bool) -> None:
    """Replace a file atomically: readers see the old content or the new one.

    Args:
        path: the file, which need not exist.
        data: the new content.
        durable: whether the new content must survive a power loss once this returns.

    Raises:
        OSError: if the disk is full or fails; the old file then stays.
    """
    new = path.with_name(path.name + TEMP_SUFFIX)
    if durable:
        write_durably(new, data)
    else:
        new.write_bytes(data)
    os.replace(new, path)
    if durable:
        sync_path(path.parent)
