from collections.abc import Callable
from pathlib import Path

import google_crc32c
import pytest

from online_meta.types import Task
from streams.formats import wire
from streams.history.archive import BlobStore
from streams.history.archive.segment import StoredRound
from streams.history.archive.stores import open_store
from streams.history.ledger import RoundEntry
from tests.support.object_store import BucketServer


@pytest.fixture(params=["folder", "object store"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    if request.param == "folder":
        return open_store(str(tmp_path / "some" / "archive"), {})
    bucketed: BucketServer = request.getfixturevalue("server")
    return open_store(f"{bucketed.url}/{tmp_path.name}", bucketed.options)


@pytest.fixture(scope="session")
def keep(make_task: Callable[..., Task]) -> Callable[..., StoredRound]:
    """Return a maker of stored rounds; each round has its own number of samples."""

    def make(round: int, payload: bytes | None = None) -> StoredRound:
        body = wire.encode(make_task(round, support=1 + round % 7, query=1 + round % 4)) if payload is None else payload
        cursor = None if round % 3 else str(round)
        digest = wire.digest(body + b"as it came")
        entry = RoundEntry(round, f"id-{round}", "é", digest, google_crc32c.value(body), 0.1 + round, cursor)
        return StoredRound(entry, body)

    return make
