"""A folder is a registry: each file in it offers one entry under the file's own name.

An entry is a function. It has the file's name, or the name that the folder's ``__init__.py`` gives as ``FUNCTION``.
Other packages add entries through entry points of the group ``online_meta.FOLDER``, such as ``online_meta.rules``.
Any function may also be named by its import path, "package.module:name".
"""

import difflib
import importlib
import pkgutil
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

ENTRY_POINTS = "online_meta"
"""The groups of entry points are called "online_meta.FOLDER"."""


def add_import_folder(folder: Path) -> None:
    """Let ``import_by_path`` find modules in ``folder``, too, after all others."""
    path = str(folder.resolve())
    if path not in sys.path:
        sys.path.append(path)


def import_by_path(path: str) -> Any:
    """Return what "package.module:name" names.

    Raises ``ValueError`` that says which part of the path is wrong.
    """
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name):
        raise ValueError(f"{path!r} is no import path: write it as 'package.module:name'")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"{path!r} cannot be imported: {error}") from error
    if not hasattr(module, name):
        public = [known for known in vars(module) if not known.startswith("_")]
        close = difflib.get_close_matches(name, public, n=3, cutoff=0.5)
        raise ValueError(f"{module_name} has no {name!r}{': did you mean ' * bool(close)}{' or '.join(close)}")
    return getattr(module, name)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "did you mean ...?" with the closest of the ``known`` names, and the list of all."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return f"{guess}known: {', '.join(known)}"


def file_names(package: ModuleType) -> list[str]:
    """List the files of the folder of ``package``, without those that begin with _."""
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def names(package: ModuleType) -> list[str]:
    """List the names that the registry ``package`` offers: its files, and the entry points of other packages."""
    return sorted({*file_names(package), *_entry_points(package.__name__)})


def load_module(package: ModuleType, name: str) -> ModuleType:
    """Return the module of an entry: the file ``name`` of the folder, or where an entry point or import path leads.

    Raises ``ValueError`` that names the nearest known one.
    """
    if ":" in name:
        return sys.modules[import_by_path(name).__module__]
    if name in file_names(package):
        return importlib.import_module(f"{package.__name__}.{name}")
    loaded = _load_entry_point(package, name)
    return loaded if isinstance(loaded, ModuleType) else sys.modules[loaded.__module__]


def load(package: ModuleType, name: str) -> Any:
    """Return the entry ``name`` of the registry ``package``; ``name`` may be an import path "package.module:name".

    Raises ``ValueError`` when there is no such entry, ``AttributeError`` when its module lacks the function.
    """
    if ":" in name:
        return import_by_path(name)
    loaded = load_module(package, name) if name in file_names(package) else _load_entry_point(package, name)
    return getattr(loaded, getattr(package, "FUNCTION", name)) if isinstance(loaded, ModuleType) else loaded


def _load_entry_point(package: ModuleType, name: str) -> Any:
    found = _entry_points(package.__name__)
    if name not in found:
        raise ValueError(f"{package.__name__} has no {name!r}: {nearest(name, names(package))}")
    try:
        return found[name].load()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"the entry point {name} = {found[name].value!r} cannot be loaded: {error}") from error


@cache
def _entry_points(package: str) -> dict[str, EntryPoint]:
    """Return the entry points for a registry; what is installed does not change while a process lives."""
    group = f"{ENTRY_POINTS}.{package.rpartition('.')[2]}"
    return {found.name: found for found in entry_points(group=group)}
