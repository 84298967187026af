"""Open the place of an archive by its path or URL."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from streams.archive.folder import FolderStore
from streams.archive.place import BlobStore


def open_store(url: str, options: Mapping[str, Any]) -> BlobStore:
    """Return the folder or the object store at ``url``.

    Args:
        url: a folder's path, or "s3://bucket/prefix", "gs://...", "az://..." and what else obstore knows.
        options: for obstore, such as {"endpoint": "http://127.0.0.1:9000", "region": "eu-central-1"}. Credentials are
            found where the clouds' own tools look for them, the environment among these.

    Raises:
        ValueError: if the URL or an option is not known.
        ImportError: if it is an object store, and obstore is not installed.
    """
    if is_url(url):
        try:
            from streams.archive.bucket import BucketStore  # obstore is only needed by those who have one
        except ModuleNotFoundError as error:
            raise ImportError(f"{url!r} needs obstore: pip install 'online-meta[object-store]'") from error
        return BucketStore.open(url, options)
    if options:
        raise ValueError(f"archive_options are for object stores; {url!r} is a folder and has none")
    return FolderStore(url)


def is_url(text: str) -> bool:
    """Return whether ``text`` names an object store and not a folder."""
    return len(urlsplit(text).scheme) > 1 and "://" in text
