"""Refuse secrets that other users can read, and create files that only this user can read."""

import os
import shlex
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PRIVATE_UMASK = 0o077
"""The umask under which a run's files are created: only their owner can read them."""


class SecretExposed(ValueError):
    """Other users can read or replace a file that contains a secret."""


def check_private(file: str | Path) -> None:
    """Raise ``SecretExposed`` if the group or others have any access to a file; pipes and terminals are not checked.

    The group may read a file of root if this process is not root's: it has no other way to read it. So are the secrets
    of Kubernetes.

    Raises:
        OSError: if the file does not exist; the message names it.
    """
    found = os.stat(file)
    mode = stat.S_IMODE(found.st_mode)
    allowed = stat.S_IRGRP if found.st_uid == 0 and os.geteuid() != 0 else 0
    if stat.S_ISREG(found.st_mode) and mode & PRIVATE_UMASK & ~allowed:
        raise SecretExposed(
            f"{file} contains a secret and other users have access to it (its mode is {mode:04o}): "
            f"run `chmod {mode & ~PRIVATE_UMASK:o} {shlex.quote(str(file))}`"
        )


@contextmanager
def private_umask() -> Iterator[None]:
    """Create files during the block, also in child processes started in it, so that only this user can read them."""
    before = os.umask(PRIVATE_UMASK)
    try:
        yield
    finally:
        os.umask(before)
