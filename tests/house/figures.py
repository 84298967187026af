"""Print the figures of the layout: ``python -m tests.house.figures``. ``test_figures.py`` holds their limits."""

import ast
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from tests.house.sources import FLOORS, ROOT, Module, imports, modules

MOST_LOOSE_MODULES = 12
"""The limit for each floor, for modules directly in the floor's folder."""
MOST_SINGLE_IMPORTERS = 20
"""The limit for files that exactly one other file uses, over all floors, without the entries of registries."""
REGISTRIES = (
    "online_meta/rules",
    "online_meta/metagrads",
    "online_meta/replay",
    "online_meta/schedules",
    "online_meta/aggregation",
    "online_meta/learners",
    "online_meta/outcomes",
    "online_meta/changepoints/detectors",
    "online_meta/changepoints/likelihoods",
    "streams/sources",
    "streams/producers",
    "trainers/engines",
    "trainers/comparators",
    "trainers/models",
    "deploy/commands",
    "deploy/telemetry/metrics",
)
"""The folders whose ``__init__.py`` is a contract that each file in them keeps."""
PROGRAM = "__name__ == '__main__'"
PROGRAM_FILES = ("__init__.py", "__main__.py")


def is_entry(module: Module) -> bool:
    """Return whether a module is an entry of a registry, known by its name."""
    folder, _, name = module.place.rpartition("/")
    return folder in REGISTRIES and not name.startswith("_")


def counted(known: dict[str, Module]) -> list[Module]:
    """Return the modules that the rules about files apply to: without entries and without the tests in a floor."""
    files = (module for module in known.values() if module.path.name not in PROGRAM_FILES)
    return [module for module in files if not is_entry(module) and module.place.split("/")[1] != "testing"]


def loose_modules(known: dict[str, Module]) -> dict[str, list[str]]:
    """Return the files directly in the folder of each floor."""
    found: dict[str, list[str]] = {floor: [] for floor in FLOORS}
    for module in known.values():
        if module.place.count("/") == 1 and module.path.name not in PROGRAM_FILES:
            found[module.place.split("/")[0]].append(module.place)
    return found


def users(known: dict[str, Module]) -> dict[str, set[str]]:
    """Return the users of each module: modules that import or run it by name, and ``python -m`` for a program."""
    found: dict[str, set[str]] = {name: set() for name in known}
    for module in known.values():
        if any(isinstance(node, ast.If) and ast.unparse(node.test) == PROGRAM for node in module.tree.body):
            found[module.name].add("python -m")
        names = [found_import.target for found_import in imports(module, known)]
        names += [
            node.value for node in ast.walk(module.tree) if isinstance(node, ast.Constant) and node.value in known
        ]
        for name in names:
            while name and name not in known:
                name = name.rpartition(".")[0]
            if name and name != module.name:
                found[name].add(module.name)
    return found


def single_importers(known: dict[str, Module]) -> list[str]:
    """Return the files that exactly one other file uses, each with its user."""
    used_by = users(known)
    return [
        f"{module.place} <- {', '.join(used_by[module.name])}"
        for module in counted(known)
        if len(used_by[module.name]) == 1 and "python -m" not in used_by[module.name]
    ]


def repeated_files(known: dict[str, Module]) -> list[str]:
    """Return the file names that occur twice on one floor, with their places."""
    places = defaultdict(list)
    for module in counted(known):
        places[module.place.split("/")[0], module.path.name].append(module.place)
    return [f"{name}: {', '.join(found)}" for (_, name), found in places.items() if len(found) > 1]


def repeated_classes(known: dict[str, Module]) -> list[str]:
    """Return the class names that occur in two places, with their places, except ``Settings`` of registry entries."""
    places = defaultdict(list)
    for module in known.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef) and not (node.name == "Settings" and is_entry(module)):
                places[node.name].append(f"{module.place}:{node.lineno}")
    return [f"{name}: {', '.join(found)}" for name, found in places.items() if len(found) > 1]


def path_aliases(files: Iterable[Path]) -> list[str]:
    """Return the places where ``pathlib.Path`` is imported under another name."""
    return [
        f"{file}:{node.lineno}"
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file)))
        if isinstance(node, ast.ImportFrom) and node.module == "pathlib"
        for alias in node.names
        if alias.name == "Path" and alias.asname is not None
    ]


def python_files(root: Path = ROOT) -> list[Path]:
    """Return all Python files of the floors and of the tests."""
    return [file for folder in (*FLOORS, "tests") for file in sorted((root / folder).rglob("*.py"))]


def main() -> None:
    """Print every figure and the files that it counts."""
    known = modules()
    for floor, loose in loose_modules(known).items():
        print(f"{len(loose):3} loose modules of {floor} (at most {MOST_LOOSE_MODULES})")
    for title, found in (
        (f"files with exactly one importer (at most {MOST_SINGLE_IMPORTERS})", single_importers(known)),
        ("file names twice on one floor (at most 0)", repeated_files(known)),
        ("class names in two places (at most 0)", repeated_classes(known)),
        ("imports of pathlib.Path by another name (at most 0)", path_aliases(python_files())),
    ):
        print(f"{len(found):3} {title}", *(f"      {line}" for line in found), sep="\n")


if __name__ == "__main__":
    main()
