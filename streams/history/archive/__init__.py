"""The archive: rounds of the history as Zarr groups in a folder or an object store, published by markers.

``BlobStore`` is what the archive needs of a place; ``stores.FolderStore`` and ``bucket.BucketStore`` implement it.
"""

from typing import NamedTuple, Protocol

from zarr.abc.store import Store


class FileChecksum(NamedTuple):
    """A file's size and the SHA-256 of its content, in hex."""

    bytes: int
    sha256: str


class BlobStore(Protocol):
    """Files by their path from the archive's root, such as "segments/0/zarr.json".

    Each method, and the stores, may raise what is in ``unreachable_errors`` when the place cannot be reached.
    """

    unreachable_errors: tuple[type[Exception], ...]

    def zarr_store(self, path: str) -> Store:
        """Return the Zarr store below ``path``, to read from and write to."""

    def sync(self, path: str) -> None:
        """Make all that was written below ``path`` durable."""

    def put(self, path: str, data: bytes) -> None:
        """Write a small file, durably: it is there whole, as it was before, or not at all."""

    def get(self, path: str) -> bytes:
        """Return a file's content; raises ``FileNotFoundError``."""

    def files(self, path: str) -> dict[str, FileChecksum]:
        """Read all files below ``path``, and return what they are by their path from there."""

    def sizes(self, path: str) -> dict[str, int]:
        """Return the size of all files below ``path``, by their path from there; none is read."""

    def names(self, path: str) -> list[str]:
        """Return what lies right below ``path``, files and folders, in order; nothing where there is no such path."""

    def remove(self, path: str) -> None:
        """Remove the file ``path`` or all that lies below it; nothing happens where there is nothing."""
