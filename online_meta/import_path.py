"""What a configuration names by its import path."""

import difflib
import importlib
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
