"""An archive in an object store: S3, Google Cloud Storage, Azure and what else obstore speaks."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, Self

import obstore
from obstore.exceptions import BaseError
from obstore.store import ObjectStore as Bucketful
from obstore.store import from_url
from zarr.abc.store import Store
from zarr.storage import ObjectStore

from streams.archive.place import FileSum, below


class Bucket:
    """A ``Place`` in an object store: each file is put in one request, and durable when that is answered."""

    away: tuple[type[Exception], ...] = (BaseError,)

    def __init__(self, url: str, options: Mapping[str, Any], root: Bucketful) -> None:
        """Take over a store; use ``Bucket.open``."""
        self._url, self._options, self._root = url.rstrip("/"), dict(options), root

    @classmethod
    def open(cls, url: str, options: Mapping[str, Any]) -> Self:
        """Name the store; nothing is asked of it yet. Raises ``ValueError`` for what obstore does not know."""
        try:
            return cls(url, options, from_url(url, **options))
        except BaseError as error:
            raise ValueError(f"the archive {url!r} cannot be opened: {error}") from error

    def store(self, path: str) -> Store:
        """Return the Zarr store below ``path``."""
        return ObjectStore(from_url(f"{self._url}/{path}", **self._options))

    def settle(self, path: str) -> None:
        """Do nothing: what was put is durable."""

    def put(self, path: str, data: bytes) -> None:
        """Write a file in one request."""
        obstore.put(self._root, path, data, use_multipart=False)

    def get(self, path: str) -> bytes:
        """Return a file's content."""
        return bytes(obstore.get(self._root, path).bytes())

    def files(self, path: str) -> dict[str, FileSum]:
        """Read all files below ``path`` back."""
        found = {}
        for file in sorted(self._paths(path)):
            data = self.get(file)
            found[file[len(path) + 1 :]] = FileSum(len(data), hashlib.sha256(data).hexdigest())
        return found

    def names(self, path: str) -> list[str]:
        """Return what lies right below ``path``."""
        return below(path, self._paths(path))

    def remove(self, path: str) -> None:
        """Remove the file ``path`` and all that lies below it."""
        paths = [path, *self._paths(path)]
        for file in paths:
            try:
                obstore.delete(self._root, file)
            except FileNotFoundError:
                continue

    def _paths(self, path: str) -> Iterator[str]:
        for some in obstore.list(self._root, prefix=f"{path}/"):
            for file in some:
                yield file["path"]
