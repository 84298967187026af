"""What goes wrong when a task is brought somewhere, and how it is tried again."""

import time
from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, stop_before_delay, wait_random_exponential
from tenacity.retry import retry_if_exception_type

from streams.formats.wire import check_id
from streams.spec import Limits
from streams.types import Rejected

RETRY_SECONDS = 300.0
"""Seconds after which no further try is begun."""

UNREACHABLE = "unreachable"

_BACKOFF = wait_random_exponential(multiplier=0.25, max=15.0)
_SLEEP = time.sleep

Result = TypeVar("Result")


class SubmitError(Exception):
    """A task was not taken.

    Attributes:
        status: the HTTP status; None if the daemon could not be reached, or where there is none.
        reason: a short slug, as the daemon gives it; otherwise "unreachable", "bad_request", "unexpected_answer", or
            of a broker or a folder "refused", "bad_id", "too_large", "cannot_write".
        detail: a sentence.
    """

    def __init__(self, status: int | None, reason: str, detail: str) -> None:
        """Keep the three apart."""
        answered = f" (HTTP {status})" if status is not None else " (no answer)" if reason == UNREACHABLE else ""
        super().__init__(f"{reason}{answered}: {detail}")
        self.status = status
        self.reason = reason
        self.detail = detail


class RetryLater(SubmitError):
    """Refused for now; ``retry_after`` are the seconds that the daemon asked for."""

    def __init__(self, status: int | None, reason: str, detail: str, retry_after: float = 0.0) -> None:
        """Keep the seconds."""
        super().__init__(status, reason, detail)
        self.retry_after = retry_after


def check_task_id(id: str) -> None:
    """Raise ``SubmitError`` for an id that every daemon would refuse."""
    try:
        check_id(id, Limits())
    except Rejected as rejection:
        raise SubmitError(None, rejection.reason, rejection.detail) from rejection


def retry(retry_seconds: float, attempt: Callable[[], Result]) -> Result:
    """Return what ``attempt`` gives, called again after growing, random waits while it raises ``RetryLater``."""
    retrying = Retrying(
        sleep=_SLEEP,
        retry=retry_if_exception_type(RetryLater),
        stop=stop_before_delay(retry_seconds),
        wait=_wait,
        reraise=True,
    )
    return retrying(attempt)


def _wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome is not None else None
    requested = error.retry_after if isinstance(error, RetryLater) else 0.0
    return requested + _BACKOFF(state)
