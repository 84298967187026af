"""Archive rounds of the history as Zarr groups in a folder or an object store; markers publish them.

``BlobStore`` is the interface to storage; ``stores.FolderStore`` and ``bucket.BucketStore`` implement it.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from zarr.abc.store import Store


class FileChecksum(NamedTuple):
    """The size of a file in ``bytes`` and the SHA-256 of its content in hexadecimal."""

    bytes: int
    sha256: str


class BlobStore(Protocol):
    """A store of files by their path from the archive's root, such as "segments/0/zarr.json".

    Each method, and each Zarr store, may raise one of ``unreachable_errors`` if the storage cannot be reached.
    """

    unreachable_errors: tuple[type[Exception], ...]

    def zarr_store(self, path: str) -> Store:
        """Return the Zarr store below ``path``, for reading."""

    def write(self, path: str, pieces: Iterable[bytes]) -> FileChecksum:
        """Write a file that does not exist yet from its pieces; return its checksum. ``sync`` makes it durable."""

    def view(self, path: str) -> AbstractContextManager[memoryview]:
        """Return the content of a file that is not empty, for a while; raises ``FileNotFoundError``."""

    def sync(self, path: str) -> None:
        """Make the file ``path``, or everything that was written below it, durable."""

    def put(self, path: str, data: bytes) -> None:
        """Write a small file durably and atomically: readers see the old file or the new one."""

    def get(self, path: str) -> bytes:
        """Return the content of a file; raises ``FileNotFoundError``."""

    def files(self, path: str) -> dict[str, FileChecksum]:
        """Read all files below ``path`` and return their checksums by path relative to it."""

    def sizes(self, path: str) -> dict[str, int]:
        """Return the sizes of all files below ``path`` by path relative to it, without reading them."""

    def names(self, path: str) -> list[str]:
        """Return the sorted names of files and folders directly below ``path``; [] if there is no such path."""

    def remove(self, path: str) -> None:
        """Remove the file ``path`` or everything below it; do nothing if it does not exist."""
