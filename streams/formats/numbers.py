"""Read the numbers and keys of rows by one rule, whatever format the rows have."""

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import numpy as np
from numpy.typing import NDArray

EXACT = 2**53
"""Below this size a float64 distinguishes all whole numbers."""

TEXT_CHARACTERS = 400
"""The longest text that is read as a number."""

MISSING = ("", "NA", "N/A", "n/a", "NaN", "nan", "null", "None")
"""Texts that stand for a missing number or date of a declared column; a missing category is an empty text."""

SUM_TOLERANCE = 1e-3
"""How far the sum of soft labels may lie from 1: float16 rounds a sum of 1 by at most half of this."""

_WHOLE = re.compile(r"[+-]?[0-9]+", re.ASCII)
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?", re.ASCII | re.IGNORECASE)
_NOT_FINITE = re.compile(r"[+-]?(?:nan|inf|infinity)", re.ASCII | re.IGNORECASE)


def read_number(value: Any, *, whole: bool) -> int | float:
    """Return the number that a value of a row stands for.

    The rule is the same for a cell of a CSV file, a value of JSON, of a table and of a Python iterator:

    - A number is an int, a float, a decimal, or a text such as "15", "-0.5" or "1e3" in ASCII digits, with spaces or
      tabs around it. "1_5", "1,000", "0x10", "", other digits than 0 to 9, truth values and dates are not numbers.
    - "nan" and "inf", as texts or as numbers, are numbers that are not finite; the task is refused later as such.
    - A whole number may be written as a decimal: 2.0, "2.0" and "2e0" are 2. From 2^53 on it may not, because it may
      have been rounded.

    Args:
        value: a value as the reader of the format returns it.
        whole: whether the number must be whole, as labels are.

    Returns:
        An int if ``whole`` is true, otherwise a float or an int.

    Raises:
        ValueError: if the value is not such a number.
    """
    number = _read(value)
    return _read_whole(number, value) if whole else float(number) if isinstance(number, Decimal) else number


def _read(value: Any) -> int | float | Decimal:
    if isinstance(value, str):
        return _read_text(value)
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, np.floating):
        return float(value)
    if isinstance(value, Decimal):
        return value if value.is_finite() else float("nan") if value.is_nan() else math.copysign(math.inf, value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{_shorten(value)} is not a number")
    return value


def _read_text(text: str) -> int | float:
    stripped = text.strip(" \t")
    if len(stripped) <= TEXT_CHARACTERS:
        if _WHOLE.fullmatch(stripped):
            return int(stripped)
        if _DECIMAL.fullmatch(stripped) or _NOT_FINITE.fullmatch(stripped):
            return float(stripped)
    raise ValueError(f"{_shorten(text)} is not a number: write it in the digits 0 to 9, such as 15, -0.5 or 1e3")


def _read_whole(number: int | float | Decimal, value: Any) -> int:
    if isinstance(number, int):
        return number
    if isinstance(number, Decimal):
        if number.adjusted() > 30 or number != number.to_integral_value():
            raise ValueError(f"{_shorten(value)} is not a whole number")
        return int(number)
    if not math.isfinite(number) or number != int(number):
        raise ValueError(f"{_shorten(value)} is not a whole number")
    if abs(number) >= EXACT:
        raise ValueError(f"{_shorten(value)} may be rounded: write a whole number from 2^53 on without a decimal point")
    return int(number)


def _shorten(value: Any) -> str:
    return repr(str(value)[:80])


def find_wrong_target(y: NDArray[Any], values: str, counted: NDArray[np.bool_] | None) -> str:
    """Return what is wrong with the first sample whose target is not what it must be; "" if all are right.

    Args:
        y: finite targets of n samples, (n, ...); of soft labels, (n, classes, ...).
        values: "counts", "probabilities" (soft labels) or "numbers", as of ``streams.spec.TargetSpec``.
        counted: which samples count, (n,), or None for all. Soft labels of the others, such as padding, may have any
            sum.
    """
    if values == "numbers":
        return ""
    below = y < 0
    wrong = below | (y != np.floor(y)) if values == "counts" else below
    expected = "a count is a whole number of 0 or more" if values == "counts" else "a soft label is at least 0"
    if wrong.any():
        at = np.unravel_index(int(wrong.argmax()), wrong.shape)
        return f"is {y[at]:g} at sample {at[0]}; {expected}"
    if values == "counts":
        return ""
    sums = y.sum(1, dtype=np.float64)
    away = (np.abs(sums - 1) > SUM_TOLERANCE).reshape(len(y), -1)
    if counted is not None:
        away &= counted[:, None]
    if not away.any():
        return ""
    sample, entry = divmod(int(away.argmax()), away.shape[1])
    total = sums.reshape(len(y), -1)[sample, entry]
    return f"sums to {total:.6g} over the classes at sample {sample}; soft labels sum to 1"


def unify_key(value: Any) -> Any:
    """Return a key in a form that equals that of every other way to write it.

    A key that is missing is None, NaN or NaT, as each format writes it: all of these are one key. Truth values differ
    from the numbers 0 and 1. Lists and tables are unified by their items. Texts are compared as they are.
    """
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist() if value.dtype.kind not in "mM" else None if np.isnat(value).all() else str(value)
    if isinstance(value, bool):
        return ("truth", value)
    if isinstance(value, list | tuple):
        return ("list", *map(unify_key, value))
    if isinstance(value, Mapping):
        return ("table", *sorted((str(name), unify_key(item)) for name, item in value.items()))
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    missing = missing or (isinstance(value, Decimal) and value.is_nan()) or type(value).__name__ == "NaTType"
    return None if missing else value
