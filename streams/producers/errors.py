"""Define the errors of producers and the retries after them."""

import time
from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, stop_before_delay, wait_random_exponential
from tenacity.retry import retry_if_exception_type

from streams.formats.wire import check_id
from streams.spec import Limits
from streams.types import Rejected

RETRY_SECONDS = 300.0
"""Seconds after which no further attempt begins."""

UNREACHABLE = "unreachable"

_BACKOFF = wait_random_exponential(multiplier=0.25, max=15.0)
_SLEEP = time.sleep

Result = TypeVar("Result")


class SubmitError(Exception):
    """A task was not accepted.

    Attributes:
        status: the HTTP status; None if the daemon could not be reached or the target is not a daemon.
        reason: the reason that the daemon gives, a short slug; otherwise "unreachable", "bad_request" or
            "unexpected_answer", or for a broker or a folder "refused", "bad_id", "too_large" or "cannot_write".
        detail: a sentence.
    """

    def __init__(self, status: int | None, reason: str, detail: str) -> None:
        """Store the three parts and compose the message."""
        answered = f" (HTTP {status})" if status is not None else " (no answer)" if reason == UNREACHABLE else ""
        super().__init__(f"{reason}{answered}: {detail}")
        self.status = status
        self.reason = reason
        self.detail = detail


class RetryLater(SubmitError):
    """A task was refused for now; the daemon asks to wait ``retry_after`` seconds."""

    def __init__(self, status: int | None, reason: str, detail: str, retry_after: float = 0.0) -> None:
        """Store the parts and the seconds to wait."""
        super().__init__(status, reason, detail)
        self.retry_after = retry_after


def check_task_id(id: str) -> None:
    """Raise ``SubmitError`` for an id that every daemon would reject."""
    try:
        check_id(id, Limits())
    except Rejected as rejection:
        raise SubmitError(None, rejection.reason, rejection.detail) from rejection


def retry(retry_seconds: float, attempt: Callable[[], Result]) -> Result:
    """Call ``attempt`` until it no longer raises ``RetryLater``, with random exponential backoff; return its result.

    Args:
        retry_seconds: seconds after which no further attempt begins; then the last ``RetryLater`` is raised.
        attempt: the function to call.
    """
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
