"""Write log lines to standard error, as text or JSON, in the same format from all processes and libraries."""

import errno
import json
import logging
import os
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from types import TracebackType
from typing import BinaryIO, Literal, TextIO

from pythonjsonlogger.json import JsonFormatter

Style = Literal["text", "json"]
TEXT = "%(asctime)s %(where)s[%(process)d] %(levelname)s %(message)s"
FIELDS = ("asctime", "levelname", "processName", "process", "name", "message")
NAMES = {
    "asctime": "time",
    "levelname": "level",
    "processName": "process",
    "process": "pid",
    "name": "logger",
    "exc_info": "exception",
}


class Origin(logging.Filter):
    """A filter that adds the process name to each record, and for a trainer its rank and current round.

    Args:
        process: name of the process.
        rank: rank of the process; None if it has none.
        plays: whether the process plays rounds; without a rank it then counts as rank 0.
    """

    def __init__(self, process: str, rank: int | None = None, *, plays: bool = False) -> None:
        """Store the origin; set ``round`` to a function that returns the current round."""
        super().__init__()
        self._process = process
        self._where = process if rank is None else f"{process} rank {rank}"
        self._rank = (rank or 0) if plays else None
        self.round: Callable[[], int | None] = lambda: None

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the fields to a record; return True, so that every record is logged."""
        record.processName, record.where = self._process, self._where
        if self._rank is not None:
            record.rank, record.round = self._rank, self.round()
        return True


class JsonLines(JsonFormatter):
    """A formatter that writes one JSON object per line.

    The fields are time (UTC), level, process, pid, logger, message, and where known exception, rank and round.
    """

    def __init__(self) -> None:
        """Configure the fields; ``where``, which is for text lines, is excluded."""
        super().__init__(FIELDS, rename_fields=NAMES, reserved_attrs=[*logging.makeLogRecord({}).__dict__, "where"])

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        """Return the record's time in ISO 8601 format, UTC, with milliseconds."""
        return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


class _StderrHandler(logging.StreamHandler[TextIO]):
    """A handler that discards what is written to standard error once nobody can read it.

    That is so when the terminal or the reader of the pipe has gone. A process must drain then as it does otherwise.
    """

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Redirect standard error to the null device if nobody can read it; otherwise print the error."""
        if not discard_unreadable_stderr(sys.exc_info()[1]):
            super().handleError(record)


def discard_unreadable_stderr(error: BaseException | None) -> bool:
    """Redirect standard output and error to the null device if ``error`` says that nobody can read standard error."""
    if not isinstance(error, OSError) or error.errno not in (errno.EIO, errno.EPIPE):
        return False
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)
    os.close(null)
    return True


def log_to_stderr(origin: Origin, style: str) -> None:
    """Send all log records, warnings and uncaught exceptions of this process to standard error.

    Does nothing if the root logger has handlers already, as in a program that embeds this one.

    Args:
        origin: filter that adds the process to each record.
        style: "text" or "json".
    """
    if logging.root.handlers:
        return
    handler = _StderrHandler(sys.stderr)
    handler.setFormatter(JsonLines() if style == "json" else logging.Formatter(TEXT))
    handler.addFilter(origin)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    known = [one for one in logging.root.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    for logger in known:
        # torch installs handlers with its own format.
        if any(isinstance(own, logging.StreamHandler) for own in logger.handlers):
            logger.handlers.clear()
            logger.propagate = True
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = lambda args: _log_uncaught(args.exc_type, args.exc_value, args.exc_traceback)
    sys.unraisablehook = lambda args: _log_uncaught(args.exc_type, args.exc_value, args.exc_traceback)


def is_json_logging() -> bool:
    """Return whether this process writes its log lines as JSON."""
    return any(isinstance(handler.formatter, JsonLines) for handler in logging.root.handlers)


def _log_uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    exception = error or kind()
    logging.getLogger(__name__).critical("%s: %s", kind.__name__, exception, exc_info=(kind, exception, trace))


def copy_lines(name: str, lines: BinaryIO) -> None:
    """Copy the output of a child process to standard error, as JSON lines, until the output ends.

    A line that is not a JSON object, such as an error message of a native library, is logged as a warning.

    Args:
        name: of the child process.
        lines: its output.
    """
    log = logging.getLogger(f"deploy.{name}")
    for line in lines:
        if _is_json(line):
            try:
                sys.stderr.buffer.write(line)
                sys.stderr.buffer.flush()
            except OSError as error:
                if not discard_unreadable_stderr(error):
                    raise
        elif line.strip():
            log.warning("%s", line.decode(errors="replace").rstrip())


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
