"""A floor imports only lower floors, and no imports are circular."""

from graphlib import CycleError, TopologicalSorter

import pytest

from tests.house.sources import FLOORS, imports, modules


def upward_imports(known):
    """Return the imports of a higher floor, except those of ``__main__.py``, which starts the program."""
    return [
        f"{found.module.place}:{found.line} imports {found.target}"
        for module in known.values()
        if module.path.name != "__main__.py"
        for found in imports(module, known)
        if found.target.split(".")[0] in FLOORS[FLOORS.index(module.name.split(".")[0]) + 1 :]
    ]


def find_circular_imports(known):
    """Return the names of modules with circular imports, [] if there are none."""
    graph = {
        module.name: {_module_of(found.target, known) for found in imports(module, known)} - {module.name, None}
        for module in known.values()
        if module.path.name != "__main__.py"
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def _module_of(target, known):
    while target and target not in known:
        target = target.rpartition(".")[0]
    return target or None


def test_no_floor_imports_a_higher_one():
    assert upward_imports(modules()) == []


def test_no_imports_are_circular():
    assert find_circular_imports(modules()) == []


def test_every_floor_is_checked():
    known = modules()
    for floor in FLOORS:
        assert sum(name.split(".")[0] == floor for name in known) > 3, floor


@pytest.mark.parametrize(
    "code",
    [
        "import trainers.loop.rounds\n",
        "import trainers\n",
        "from trainers.loop.rounds import play\n",
        "from trainers import rounds\n",
        "import importlib\nimportlib.import_module('trainers.loop.rounds')\n",
        "def late():\n    from trainers import rounds\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from trainers.loop.rounds import play\n",
    ],
)
def test_an_upward_import_is_caught(tree, code):
    known = tree({"trainers/loop/rounds.py": "def play(): ...\n", "streams/formats/wire.py": code})
    (found,) = upward_imports(known)
    assert found.startswith("streams/formats/wire.py:")
    assert "imports trainers" in found


def test_downward_imports_and_those_of_main_are_accepted(tree):
    known = tree(
        {
            "streams/formats/wire.py": "from online_meta import types\nimport online_meta.types\n",
            "online_meta/types.py": "import collections\n",
            "online_meta/__main__.py": "from deploy.cli import main\n",
            "deploy/cli.py": "import streams.formats.wire\n",
        }
    )
    assert upward_imports(known) == []
    assert find_circular_imports(known) == []


@pytest.mark.parametrize(
    "back",
    [
        "import streams.a\n",
        "from streams import a\n",
        "from streams.a import thing\n",
        "from . import a\n",
        "from .a import thing\n",
    ],
)
def test_a_circular_import_is_caught(tree, back):
    known = tree(
        {"streams/a.py": "from streams.b import x\n", "streams/b.py": "import streams.c\n", "streams/c.py": back}
    )
    assert set(find_circular_imports(known)) == {"streams.a", "streams.b", "streams.c"}
