"""Tasks and histories shared by the tests of this folder."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from online_meta.types import Batch, Task
from streams.formats import wire
from streams.history.history import History
from streams.ingest import group_commit
from streams.ingest.ingest import Ingest
from streams.spec import Limits, TaskSpec
from streams.types import Arrival, Record
from tests.support import object_store
from tests.support.ingesting import Counts, Faulty, Open
from tests.support.object_store import BucketServer


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BucketServer]:
    """A real S3 server with an empty bucket."""
    with object_store.running(tmp_path_factory.mktemp("s3") / "log") as bucketed:
        yield bucketed


@pytest.fixture(scope="session")
def spec() -> TaskSpec:
    return TaskSpec(x_shape=(2,), y="class", ways=3)


@pytest.fixture(scope="session")
def make_task() -> Callable[[int], Task]:
    def make(seed: int, support: int = 6, query: int = 3) -> Task:
        random = torch.Generator().manual_seed(seed)
        batches = (
            Batch(torch.randn(n, 2, generator=random), torch.randint(3, (n,), generator=random))
            for n in (support, query)
        )
        return Task(*batches)

    return make


@pytest.fixture(scope="session")
def make_record(make_task: Callable[[int], Task]) -> Callable[..., Record]:
    def make(number: int, *, id: str | None = None, source: str = "s", cursor: str | None = None) -> Record:
        body = wire.encode(make_task(number))
        return Record(id or f"task-{number}", body, wire.digest(body), source, cursor, 1000.0 + number)

    return make


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    with History.open(tmp_path / "history", write=True) as opened:
        yield opened


@pytest.fixture
def counts() -> Counts:
    return Counts()


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[Faulty]:
    with Faulty.open(tmp_path / "history", write=True) as opened:
        yield opened


@pytest.fixture
def open_ingest(faulty: Faulty, spec: TaskSpec, counts: Counts, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    opened: list[Ingest] = []
    monkeypatch.setattr(group_commit, "PAUSE_SECONDS", 0.02)

    def open_one(**limits: int) -> Ingest:
        opened.append(
            Ingest(
                faulty,
                spec,
                Limits(**limits),
                lambda: counts.learned,
                lambda *said: counts.rejected.append(said),
                lambda *said: counts.committed.append(said),
                clock=lambda: 77.0,
            )
        )
        return opened[-1]

    yield open_one
    faulty.fault = None
    if faulty.gate is not None:
        faulty.gate.set()
    for one in opened:
        one.close()


@pytest.fixture
def arrive(make_task: Callable[[int], Task]) -> Callable[..., Arrival]:
    def make(number: int, *, id: str | None = None, source: str = "http", cursor: str | None = None) -> Arrival:
        return Arrival(id or f"task-{number}", wire.encode(make_task(number)), source, cursor)

    return make
