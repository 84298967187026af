from collections.abc import Callable
from pathlib import Path

import google_crc32c
import pytest

from online_meta.types import Task
from streams import wire
from streams.archive.opening import open_place
from streams.archive.place import Place
from streams.archive.segment import Kept
from streams.transaction import Entry
from tests.streams.archive.object_store import Bucketed


@pytest.fixture(params=["folder", "object store"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "folder":
        return open_place(str(tmp_path / "some" / "archive"), {})
    bucketed: Bucketed = request.getfixturevalue("server")
    return open_place(f"{bucketed.url}/{tmp_path.name}", bucketed.options)


@pytest.fixture(scope="session")
def keep(make_task: Callable[..., Task]) -> Callable[..., Kept]:
    """A round of its own number of samples, as the ledger keeps it."""

    def make(round: int, payload: bytes | None = None) -> Kept:
        body = wire.encode(make_task(round, support=1 + round % 7, query=1 + round % 4)) if payload is None else payload
        cursor = None if round % 3 else str(round)
        digest = wire.digest(body + b"as it came")
        entry = Entry(round, f"id-{round}", "é", digest, google_crc32c.value(body), 0.1 + round, cursor)
        return Kept(entry, body)

    return make
