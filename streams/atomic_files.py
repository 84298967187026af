"""Files that are there whole or not at all, also after a power loss."""

import os
from pathlib import Path

TEMP_SUFFIX = ".new"
"""What the name of a file that is being written ends with."""


def sync_path(path: Path) -> None:
    """Return when what is in a file, or the names in a folder, would survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, data: bytes) -> None:
    """Write a file and return when its bytes would survive a power loss (its name: ``sync_path`` of the folder)."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes, *, durable: bool) -> None:
    """Put ``data`` under ``path`` in one step: readers see the old file or the new one, never a part."""
    new = path.with_name(path.name + TEMP_SUFFIX)
    if durable:
        write_durably(new, data)
    else:
        new.write_bytes(data)
    os.replace(new, path)
    if durable:
        sync_path(path.parent)
