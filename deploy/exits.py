"""Exit codes, those of sysexits.h, and the errors that end a command with one of them."""

import os

DONE = os.EX_OK
USAGE = os.EX_USAGE
BROKEN = os.EX_SOFTWARE
TRY_LATER = os.EX_TEMPFAIL
CONFIG = os.EX_CONFIG


class CommandError(Exception):
    """A command cannot go on: ``message`` says what is wrong, where, and what would be right."""

    def __init__(self, code: int, message: str) -> None:
        """Keep the exit code beside the message."""
        super().__init__(message)
        self.code = code


class ConfigError(CommandError):
    """The configuration is not one that can be run."""

    def __init__(self, message: str) -> None:
        """Exit code 78."""
        super().__init__(CONFIG, message)
