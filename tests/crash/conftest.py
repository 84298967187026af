import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.walker import Walker

MEMORY = Path("/dev/shm")
"""Written data survives the death of a process on any file system; writing to memory is faster."""


@pytest.fixture(scope="module")
def walker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walker]:
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else tmp_path_factory.getbasetemp()) as folder:
        opened = Walker(Path(folder))
        yield opened
        opened.close()
