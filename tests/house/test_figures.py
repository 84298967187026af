"""The layout of the floors: few loose modules, few files with one importer, no repeated name."""

import ast

import pytest

from tests.house import figures
from tests.house.sources import FLOORS, modules


def test_a_floor_has_few_loose_modules():
    for floor, loose in figures.loose_modules(modules()).items():
        assert 0 < len(loose) <= figures.MOST_LOOSE_MODULES, (floor, loose)


def test_few_files_have_one_importer():
    found = figures.single_importers(modules())
    assert len(found) <= figures.MOST_SINGLE_IMPORTERS, found


def test_no_file_name_occurs_twice_on_a_floor():
    assert figures.repeated_files(modules()) == []


def test_no_class_name_occurs_in_two_places():
    assert figures.repeated_classes(modules()) == []


def test_path_is_imported_under_its_own_name():
    assert figures.path_aliases(figures.python_files()) == []


def test_every_registry_exists_and_has_a_contract():
    known = {module.place: module for module in modules().values()}
    for registry in figures.REGISTRIES:
        assert sum(figures.is_entry(module) and place.startswith(f"{registry}/") for place, module in known.items()) > 1
        contract = ast.get_docstring(known[f"{registry}/__init__.py"].tree)
        assert contract is not None, registry


def test_the_command_prints_every_figure(capsys):
    figures.main()
    printed = capsys.readouterr().out
    for floor in FLOORS:
        assert f"loose modules of {floor}" in printed
    assert printed.count("(at most 0)") == 3
    assert f"(at most {figures.MOST_SINGLE_IMPORTERS})" in printed


def test_loose_modules_are_counted(tree):
    known = tree({"streams/a.py": "", "streams/b.py": "", "streams/__main__.py": "", "streams/room/c.py": ""})
    found = figures.loose_modules(known)
    assert found == {"online_meta": [], "streams": ["streams/a.py", "streams/b.py"], "trainers": [], "deploy": []}


@pytest.mark.parametrize(
    "use",
    [
        "import streams.room.a\n",
        "from streams.room import a\n",
        "from streams.room.a import thing\n",
        "from .room import a\n",
        "COMMAND = ['-m', 'streams.room.a']\n",
        "import importlib\nimportlib.import_module('streams.room.a')\n",
    ],
)
def test_a_file_with_one_importer_is_found_for_every_kind_of_use(tree, use):
    files = {"streams/room/a.py": "thing = 1\n", "streams/b.py": use}
    assert figures.single_importers(tree(files)) == ["streams/room/a.py <- streams.b"]
    assert figures.single_importers(tree({**files, "streams/c.py": "from streams.room.a import thing\n"})) == []


def test_a_file_does_not_count_as_its_own_importer(tree):
    known = tree({"streams/a.py": "NAME = 'streams.a'\n", "streams/b.py": "import streams.a\n"})
    assert figures.single_importers(known) == ["streams/a.py <- streams.b"]


def test_a_program_counts_as_used(tree):
    known = tree({"deploy/a.py": "if __name__ == '__main__':\n    pass\n", "deploy/b.py": "import deploy.a\n"})
    assert figures.single_importers(known) == []


def test_entries_of_registries_may_have_one_importer(tree):
    files = {"streams/sources/a.py": "", "streams/sources/_shared.py": "", "streams/sources/__init__.py": ""}
    use = "from streams.sources import a, _shared\n"
    found = figures.single_importers(tree({**files, "streams/b.py": use}))
    assert found == ["streams/sources/_shared.py <- streams.b"]


def test_a_repeated_file_name_is_found(tree):
    known = tree(
        {
            "streams/a.py": "",
            "streams/room/a.py": "",
            "trainers/a.py": "",  # another floor
            "streams/sources/a.py": "",  # an entry of a registry
            "streams/room/__main__.py": "",
            "streams/__main__.py": "",
        }
    )
    assert figures.repeated_files(known) == ["a.py: streams/a.py, streams/room/a.py"]


def test_a_repeated_class_name_is_found(tree):
    known = tree(
        {
            "streams/sources/a.py": "class Settings: ...\n",
            "streams/sources/b.py": "class Settings: ...\n",
            "streams/a.py": "class Twice: ...\nclass Once: ...\n",
            "deploy/b.py": "def late():\n    class Twice: ...\n",
        }
    )
    assert figures.repeated_classes(known) == ["Twice: streams/a.py:1, deploy/b.py:2"]


def test_settings_outside_registries_must_be_unique(tree):
    known = tree({"streams/a.py": "class Settings: ...\n", "deploy/b.py": "class Settings: ...\n"})
    assert figures.repeated_classes(known) == ["Settings: streams/a.py:1, deploy/b.py:1"]


def test_another_name_for_path_is_found(tree, tmp_path):
    alias = "from pathlib import Path as " + "Folder\n"
    tree({"streams/a.py": alias, "streams/b.py": "from pathlib import Path\nfrom io import BytesIO as Path2\n"})
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_a.py").write_text("def late():\n    " + alias)
    places = [f"{tmp_path}/streams/a.py:1", f"{tmp_path}/tests/test_a.py:2"]
    assert figures.path_aliases(figures.python_files(tmp_path)) == places
