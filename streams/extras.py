"""Client libraries that not everybody needs."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def translate_import_errors(extra: str) -> Iterator[None]:
    """Say how to install what cannot be imported; raises ``ImportError``."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(f"{error}; install it: pip install 'online-meta[{extra}]'") from error
