"""Tell a model's exception on a task from a fault of the machine, and collect such exceptions on every rank."""

import errno
import logging

import torch

from online_meta.batching.compile import CompileError

log = logging.getLogger(__name__)
_MACHINE_FAULTS = (
    CompileError,
    MemoryError,
    OSError,
    torch.OutOfMemoryError,
    getattr(torch, "AcceleratorError", torch.OutOfMemoryError),
)
_MEMORY_MESSAGES = ("out of memory", "can't allocate memory", "cannot allocate memory", "CUDA error", "device-side")
"""Parts of the messages of plain ``RuntimeError``, with which torch reports memory and devices on some paths."""


def is_task_failure(error: BaseException) -> bool:
    """Return whether an exception that was raised while a model computed on a task is due to the task.

    Memory, device, compiler and I/O errors are due to the machine: the same task can succeed on another one, or later.
    """
    if not isinstance(error, Exception) or isinstance(error, _MACHINE_FAULTS):
        return False
    if getattr(error, "errno", None) in (errno.ENOMEM, errno.ENOSPC, errno.EIO):
        return False
    return not (isinstance(error, RuntimeError) and any(part in _text(error) for part in _MEMORY_MESSAGES))


def describe_failure(error: BaseException) -> str:
    """Return an exception as one line: its type and the first line of its message, at most 300 characters."""
    first = (_text(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:300]


def _text(error: BaseException) -> str:
    """Return the message of an exception in valid Unicode; "" if the exception fails to write it."""
    try:
        return str(error).encode("utf-8", "replace").decode()
    except Exception:
        return ""


class TaskFailures:
    """The exceptions of a model on the tasks of one update, by round.

    A rank whose sum of gradients fails adds the exception here and continues with a sum that is not finite, so that it
    still joins the next collective, which then makes no step on any rank. Whoever plays the update must check ``found``
    afterwards, and discard the update if it is not empty.
    """

    def __init__(self) -> None:
        """Start without exceptions."""
        self.found: dict[int, str] = {}

    def add(self, round: int, error: Exception) -> None:
        """Add the exception of a round, and log it with its traceback; the first one of a round stays."""
        if round not in self.found:
            log.error("the model failed on a task: %s", describe_failure(error), exc_info=error)
        self.found.setdefault(round, describe_failure(error))
