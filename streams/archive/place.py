"""Where an archive lies: what folders and object stores have in common."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from zarr.abc.store import Store


class FileSum(NamedTuple):
    """A file's size and the SHA-256 of its content, in hex."""

    bytes: int
    sha256: str


class Place(Protocol):
    """Files by their path from the archive's root, such as "segments/0/zarr.json".

    Each method, and the stores, may raise what is in ``away`` when the place cannot be reached.
    """

    away: tuple[type[Exception], ...]

    def store(self, path: str) -> Store:
        """Return the Zarr store below ``path``, to read from and write to."""

    def settle(self, path: str) -> None:
        """Make all that was written below ``path`` durable."""

    def put(self, path: str, data: bytes) -> None:
        """Write a small file, durably: it is there whole, as it was before, or not at all."""

    def get(self, path: str) -> bytes:
        """Return a file's content; raises ``FileNotFoundError``."""

    def files(self, path: str) -> dict[str, FileSum]:
        """Return all files below ``path``, by their path from there."""

    def names(self, path: str) -> list[str]:
        """Return what lies right below ``path``, files and folders, in order; nothing where there is no such path."""

    def remove(self, path: str) -> None:
        """Remove the file ``path`` or all that lies below it; nothing happens where there is nothing."""


def below(prefix: str, paths: Iterator[str]) -> list[str]:
    """Return the first part of each path below ``prefix``, in order and each once."""
    skip = len(prefix.rstrip("/")) + 1
    return sorted({path[skip:].split("/")[0] for path in paths if path[skip:]})
