"""Store an archive in an object store: S3, Google Cloud Storage, Azure or another that obstore supports."""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

import obstore
from obstore.exceptions import BaseError
from obstore.store import ObjectStore as ObstoreStore
from obstore.store import from_url
from zarr.abc.store import Store
from zarr.storage import ObjectStore

from streams.history.archive import FileChecksum

CLIENT_OPTIONS = (
    "allow_http",
    "allow_invalid_certificates",
    "connect_timeout",
    "http1_only",
    "http2_only",
    "pool_idle_timeout",
    "proxy_url",
    "timeout",
    "user_agent",
)
"""Options that obstore takes separately from those of the store; it panics if they are mixed."""


class BucketStore:
    """A ``BlobStore`` in an object store; each file is written by one request and durable when that succeeds."""

    unreachable_errors: tuple[type[Exception], ...] = (BaseError,)

    def __init__(self, url: str, options: Mapping[str, Any], root: ObstoreStore) -> None:
        """Take an open store; call ``BucketStore.open`` instead."""
        self._url, self._options, self._root = url.rstrip("/"), dict(options), root

    @classmethod
    def open(cls, url: str, options: Mapping[str, Any]) -> Self:
        """Open the store at a URL without sending a request yet.

        Args:
            url: the URL of the archive, such as "s3://bucket/prefix".
            options: options of the store and of the HTTP client, such as "allow_http".

        Raises:
            ValueError: if obstore does not know the URL or an option.
        """
        store_options = {name: value for name, value in options.items() if name not in CLIENT_OPTIONS}
        client = {
            **{name: options[name] for name in options if name not in store_options},
            **store_options.pop("client_options", {}),
        }
        options = {**store_options, "client_options": client}
        try:
            return cls(url, options, from_url(url, **options))
        except BaseError as error:
            raise ValueError(f"the archive {url!r} cannot be opened: {str(error).splitlines()[0]}") from error

    def zarr_store(self, path: str) -> Store:
        """Return the Zarr store below ``path``."""
        return ObjectStore(from_url(f"{self._url}/{path}", **self._options))

    def write(self, path: str, pieces: Iterable[bytes]) -> FileChecksum:
        """Write a file in one request."""
        data = b"".join(pieces)
        self.put(path, data)
        return _checksum(data)

    @contextlib.contextmanager
    def view(self, path: str) -> Iterator[memoryview]:
        """Fetch a file."""
        yield memoryview(self.get(path))

    def sync(self, path: str) -> None:
        """Do nothing: written files are durable."""

    def put(self, path: str, data: bytes) -> None:
        """Write a file in one request."""
        obstore.put(self._root, path, data, use_multipart=False)

    def get(self, path: str) -> bytes:
        """Return the content of a file."""
        return bytes(obstore.get(self._root, path).bytes())

    def files(self, path: str) -> dict[str, FileChecksum]:
        """Read all files below ``path`` and return their checksums."""
        found = {}
        for name in self.sizes(path):
            found[name] = _checksum(self.get(f"{path}/{name}"))
        return found

    def sizes(self, path: str) -> dict[str, int]:
        """Return the sizes of all files below ``path``."""
        return {file[len(path) + 1 :]: size for file, size in sorted(self._list(path))}

    def names(self, path: str) -> list[str]:
        """Return the names directly below ``path``."""
        return sorted({name.split("/")[0] for name in self.sizes(path)})

    def remove(self, path: str) -> None:
        """Remove the file ``path`` and everything below it."""
        for file in (path, *(file for file, _ in self._list(path))):
            with contextlib.suppress(FileNotFoundError):
                obstore.delete(self._root, file)

    def _list(self, path: str) -> Iterator[tuple[str, int]]:
        for page in obstore.list(self._root, prefix=f"{path}/"):
            yield from ((file["path"], file["size"]) for file in page)


def _checksum(data: bytes) -> FileChecksum:
    return FileChecksum(len(data), hashlib.sha256(data).hexdigest())
