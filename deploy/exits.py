"""Exit codes (from sysexits.h) and the exceptions that end a command with one of them."""

import errno
import os

from streams.history.errors import ArchiveUnreachable, HistoryBusy, HistoryDamaged, HistoryError, HistoryFull

DONE = os.EX_OK
USAGE = os.EX_USAGE
BROKEN = os.EX_SOFTWARE
TRY_LATER = os.EX_TEMPFAIL
CONFIG = os.EX_CONFIG


class CommandError(Exception):
    """An error that ends a command.

    Args:
        code: exit code of the process.
        message: says what is wrong, where, and how to correct it.
    """

    def __init__(self, code: int, message: str) -> None:
        """Store the message and the exit code."""
        super().__init__(message)
        self.code = code


class ConfigError(CommandError):
    """An invalid configuration; exit code 78."""

    def __init__(self, message: str) -> None:
        """Store the message."""
        super().__init__(CONFIG, message)


EXPECTED = (CommandError, HistoryError, OSError)
"""Errors that the environment or the user causes: their message is for the user, without a traceback."""


def find_exit_code(error: Exception) -> int:
    """Return the exit code for an error of ``EXPECTED``."""
    if isinstance(error, CommandError):
        return error.code
    if isinstance(error, HistoryDamaged):
        return BROKEN
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return TRY_LATER if full or isinstance(error, HistoryBusy | HistoryFull | ArchiveUnreachable) else CONFIG
