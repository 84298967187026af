"""Read dates, times and spans of time as seconds."""

import re
from datetime import UTC, date, datetime
from typing import Any

import numpy as np

from streams.formats.numbers import read_number

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
"""The units of a span of time, in seconds."""

LATEST = datetime(9999, 12, 31, tzinfo=UTC).timestamp()
"""The latest time that is read, in Unix seconds; -``LATEST`` bounds the earliest one."""

_SPAN = re.compile(r"([0-9]+(?:\.[0-9]+)?)([smhdw])", re.ASCII)


def read_span(text: str, option: str) -> float:
    """Return the seconds of a span such as "7d"; raises ``ValueError`` that names the ``option``."""
    found = _SPAN.fullmatch(text)
    if found is None or float(found[1]) <= 0:
        raise ValueError(f'{option} = {text!r}: write a number and a unit, s, m, h, d or w, such as "7d"')
    return float(found[1]) * UNITS[found[2]]


def read_time(value: Any) -> float:
    """Return the Unix seconds of a date, a time, an ISO 8601 text or a number of Unix seconds; without a zone, UTC.

    Raises:
        ValueError: if the value is none of these, or lies outside the years 1 to 9999.
    """
    if isinstance(value, np.datetime64):
        value = value.astype("datetime64[us]").item()
    if isinstance(value, str):
        value = _read_text(value.strip())
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    seconds = read_number(value, whole=False)
    if not -62135596800 <= seconds <= LATEST:  # Also if it is NaN, or a whole number too large for a float.
        raise ValueError(f"{str(value)[:80]!r} is no time in Unix seconds: it lies outside the years 1 to 9999")
    return float(seconds)


def _read_text(text: str) -> Any:
    """Return an ISO 8601 text as a datetime, and any other text as it is; "20240131" is a date."""
    if text.isdigit() and len(text) != 8:
        return text
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        if re.fullmatch(r"[-+0-9.eE]+", text) and text.count("-") < 2 and text.count(".") < 2:
            return text
        raise ValueError(f"{text[:80]!r} is no date: write it as 2024-01-31 or 2024-01-31T12:00:00") from None
