"""Look for what is left of an entity in the files of a run."""

from collections.abc import Sequence
from pathlib import Path

from streams.entities import find_entity
from streams.history.history import History


def find_traces(folder: Path, key: str, mark: bytes, others: Sequence[bytes]) -> list[str]:
    """Return what of an entity is in the files of a run, byte by byte, and in what Zarr and SQLite read from them.

    Args:
        folder: of the run.
        key: of the entity.
        mark: bytes that only its rows have.
        others: further forms of its key or its numbers.
    """
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    traces = (mark, key.encode(), *others)
    found = [f"{path}: {trace!r}" for path in files for trace in traces if trace in path.read_bytes()]
    with History.open(folder / "history", write=False) as history:
        for name in history.archive.names():
            for entry, payload in history.archive.read_all(name):
                found += [f"{name}: {entry.round}"] if mark in payload or find_entity(entry.id) == key else []
    return found
