"""Log lines on standard error: text for people, JSON for services, of one form whoever writes them."""

import json
import logging
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from types import TracebackType
from typing import BinaryIO, Literal

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
    """Says in each record which process it is of: its name, and of a trainer its rank and the round it plays."""

    def __init__(self, process: str, rank: int | None = None, *, plays: bool = False) -> None:
        """A process that ``plays`` is rank 0 where it has no rank."""
        super().__init__()
        self._process = process
        self._where = process if rank is None else f"{process} rank {rank}"
        self._rank = (rank or 0) if plays else None
        self.round: Callable[[], int | None] = lambda: None

    def filter(self, record: logging.LogRecord) -> bool:
        """Add to the record; none is left out."""
        record.processName, record.where = self._process, self._where
        if self._rank is not None:
            record.rank, record.round = self._rank, self.round()
        return True


class JsonLines(JsonFormatter):
    """One JSON object a line: time (UTC), level, process, pid, logger, message; exception, rank, round where known."""

    def __init__(self) -> None:
        """What is only there for people, ``where``, is left out."""
        super().__init__(FIELDS, rename_fields=NAMES, reserved_attrs=[*logging.makeLogRecord({}).__dict__, "where"])

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        """Return the record's time in ISO 8601, UTC, with milliseconds."""
        return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def log_to_stderr(origin: Origin, style: str) -> None:
    """Make lines of all that this process says: through any logger, as a warning, as an exception nobody catches.

    Where logging was set up before, by a program that this is a part of, nothing is changed.
    """
    if logging.root.handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if style == "json" else logging.Formatter(TEXT))
    handler.addFilter(origin)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    known = [one for one in logging.root.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    for logger in known:
        if any(isinstance(own, logging.StreamHandler) for own in logger.handlers):  # torch's lines have another form.
            logger.handlers.clear()
            logger.propagate = True
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = lambda args: _log_uncaught(args.exc_type, args.exc_value, args.exc_traceback)
    sys.unraisablehook = lambda args: _log_uncaught(args.exc_type, args.exc_value, args.exc_traceback)


def is_json_logging() -> bool:
    """Return whether this process was told to write its lines in JSON."""
    return any(isinstance(handler.formatter, JsonLines) for handler in logging.root.handlers)


def _log_uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    exception = error or kind()
    logging.getLogger(__name__).critical("%s: %s", kind.__name__, exception, exc_info=(kind, exception, trace))


def copy_lines(name: str, lines: BinaryIO) -> None:
    """Copy what children called ``name`` write, in JSON, to standard error, until all of them have ended.

    What is no JSON, such as the last words of a native library, becomes the message of a line that is.
    """
    log = logging.getLogger(f"deploy.{name}")
    for line in lines:
        if _is_json(line):
            sys.stderr.buffer.write(line)
            sys.stderr.buffer.flush()
        elif line.strip():
            log.warning("%s", line.decode(errors="replace").rstrip())


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
