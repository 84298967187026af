"""Fixtures shared by the tests of the layout."""

import pytest

from tests.house.sources import FLOORS, modules


@pytest.fixture
def tree(tmp_path):
    """Return a writer of a synthetic tree of the four packages with the given files."""

    def write(files):
        for floor in FLOORS:
            (tmp_path / floor).mkdir(exist_ok=True)
            (tmp_path / floor / "__init__.py").touch()
        for place, code in files.items():
            (tmp_path / place).parent.mkdir(exist_ok=True, parents=True)
            (tmp_path / place).write_text(code)
        return modules(tmp_path)

    return write
