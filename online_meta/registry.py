"""A folder is a registry: each file in it offers one thing under the file's own name."""

import difflib
import importlib
import pkgutil
from collections.abc import Iterable
from types import ModuleType
from typing import Any


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
    """Say which of the ``known`` names was probably meant, and what all of them are."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return f"{guess}known: {', '.join(known)}"


def names(package: ModuleType) -> list[str]:
    """List the names that the folder of ``package`` offers: its files, without those that begin with _."""
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def load_module(package: ModuleType, name: str) -> ModuleType:
    """Import the file ``name`` of the folder; raises ``ValueError`` naming the nearest known one."""
    if name not in names(package):
        raise ValueError(f"{package.__name__} has no {name!r}: {nearest(name, names(package))}")
    return importlib.import_module(f"{package.__name__}.{name}")


def load(package: ModuleType, name: str) -> Any:
    """Return what the file ``name`` of the folder offers under its own name.

    Raises ``ValueError`` when there is no such file, ``AttributeError`` when it lacks that name.
    """
    return getattr(load_module(package, name), name)
