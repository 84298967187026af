"""Open the store of an archive: a folder or an object store."""

import hashlib
import mmap
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from zarr.abc.store import Store
from zarr.storage import LocalStore

from streams.atomic_files import TEMP_SUFFIX, replace_file, sync_path
from streams.history.archive import BlobStore, FileChecksum

SYNC_THREADS = 8


class FolderStore:
    """A ``BlobStore`` in a folder, which the first write creates."""

    unreachable_errors: tuple[type[Exception], ...] = ()

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Take the path of the folder, which need not exist."""
        self._root = Path(path)

    def zarr_store(self, path: str) -> Store:
        """Return the Zarr store below ``path``."""
        return LocalStore(self._root / path)

    def write(self, path: str, pieces: Iterable[bytes]) -> FileChecksum:
        """Write a file; its SHA-256 is computed meanwhile."""
        file, size, digest = self._root / path, 0, hashlib.sha256()
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "xb", buffering=0) as opened:
            for piece in pieces:
                left = memoryview(piece)
                while left:
                    left = left[opened.write(left) :]
                size += len(piece)
                digest.update(piece)
        return FileChecksum(size, digest.hexdigest())

    @contextmanager
    def view(self, path: str) -> Iterator[memoryview]:
        """Map a file into memory, until the last view of it is gone."""
        with open(self._root / path, "rb") as file:
            yield memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def sync(self, path: str) -> None:
        """Fsync a file, or all files and folders below ``path``, and the folders above it, several at a time."""
        top = self._root / path
        above = top.parents
        paths = (top, *top.rglob("*"), *above[: above.index(self._root.parent) + 1])
        with ThreadPoolExecutor(SYNC_THREADS) as executor:  # They share the commits of the file system's journal.
            for _ in executor.map(sync_path, paths):
                pass

    def put(self, path: str, data: bytes) -> None:
        """Write a file under a temporary name, fsync it and rename it."""
        file = self._root / path
        new = not file.parent.exists()
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, data, durable=True)
        if new:
            self.sync(str(Path(path).parent))

    def get(self, path: str) -> bytes:
        """Return the content of a file."""
        return (self._root / path).read_bytes()

    def files(self, path: str) -> dict[str, FileChecksum]:
        """Read all files below ``path`` and return their checksums."""
        top = self._root / path
        return {name: _checksum(top / name) for name in self.sizes(path)}

    def sizes(self, path: str) -> dict[str, int]:
        """Return the sizes of all files below ``path``."""
        top = self._root / path
        found = sorted(file for file in top.rglob("*") if file.is_file())
        return {file.relative_to(top).as_posix(): file.stat().st_size for file in found}

    def names(self, path: str) -> list[str]:
        """Return the names in a folder, without files that are still being written."""
        top = self._root / path
        return sorted(name for name in os.listdir(top) if not name.endswith(TEMP_SUFFIX)) if top.is_dir() else []

    def remove(self, path: str) -> None:
        """Remove a file or a folder."""
        target = self._root / path
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)


def _checksum(file: Path) -> FileChecksum:
    with open(file, "rb") as opened:
        return FileChecksum(file.stat().st_size, hashlib.file_digest(opened, "sha256").hexdigest())


def open_store(url: str, options: Mapping[str, Any]) -> BlobStore:
    """Open the folder or the object store at ``url``.

    Args:
        url: the path of a folder, or "s3://bucket/prefix", "gs://...", "az://..." or another URL that obstore supports.
        options: options of obstore, such as {"endpoint": "http://127.0.0.1:9000", "region": "eu-central-1"}.
            Credentials are read from where the clouds' own tools look for them, for example the environment.

    Raises:
        ValueError: if the URL or an option is unknown.
        ImportError: if the URL is that of an object store and obstore is not installed.
    """
    if is_url(url):
        try:
            from streams.history.archive.bucket import BucketStore  # obstore is an optional dependency
        except ModuleNotFoundError as error:
            raise ImportError(f"{url!r} needs obstore: pip install 'online-meta[object-store]'") from error
        return BucketStore.open(url, options)
    if options:
        raise ValueError(f"archive_options apply only to object stores; {url!r} is a folder")
    return FolderStore(url)


def is_url(text: str) -> bool:
    """Return whether ``text`` names an object store and not a folder."""
    return len(urlsplit(text).scheme) > 1 and "://" in text
