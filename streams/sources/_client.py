"""What the sources that read from a broker share."""

import re
from pathlib import Path

PREFETCH_BYTES = 16 * 1024 * 1024
"""How many bytes of tasks a source asks its broker for at once, where it can know beforehand."""


def hide_secrets(address: str) -> str:
    """Return an address, or several, without the user and password that may stand in it."""
    return re.sub(r"//[^/@,]*@", "//", address)


def read_secret(file: str) -> str:
    """Return what a file of one line holds; raises ``OSError`` or ``ValueError`` naming it."""
    secret = Path(file).read_text(encoding="utf-8").strip()
    if not secret or "\n" in secret:
        raise ValueError(f"{file} must hold one line, and nothing else")
    return secret


def count_that_fits(most: int, sizes: list[int]) -> int:
    """Return how many entries to ask for next, given the sizes in bytes of those that came last, 1 to ``most``."""
    return max(1, min(most, PREFETCH_BYTES // max([*sizes, 1])))


def read_properties(file: str) -> dict[str, str]:
    """Return the settings in a file of "name = value" lines; # begins a comment line.

    Raises:
        OSError: if it cannot be read.
        ValueError: naming the line that is no setting.
    """
    properties = {}
    for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), 1):
        name, equals, value = line.partition("=")
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if not equals or not name.strip():
            raise ValueError(
                f"{file}, line {number}: write it as name = value, for example security.protocol = SASL_SSL"
            )
        properties[name.strip()] = value.strip()
    return properties
