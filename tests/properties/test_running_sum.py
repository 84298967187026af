"""The ledger's running sum against exact arithmetic, on ill-conditioned sums."""

import math
from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from online_meta.regret.running_sums import RunningSum

sizes = st.floats(-1e300, 1e300, allow_nan=False, allow_infinity=False, allow_subnormal=False)
losses = st.floats(0.0, 1e300, allow_nan=False, allow_infinity=False, allow_subnormal=False)
cancelling = st.lists(
    st.sampled_from([1e16, -1e16, 1.0, -1.0, 1e-16, 0.1, -0.1, 2**53 + 0.0, 1e100, -1e100]), max_size=60
)
UNIT = Fraction(1, 2**53)


def sum_with_ledger(values):
    total = RunningSum()
    for value in values:
        total = total.plus(value)
    return total.value()


def error_of(values):
    """Return the exact error of the sum."""
    return abs(Fraction(sum_with_ledger(values)) - sum(map(Fraction, values), Fraction(0)))


@settings(max_examples=150, deadline=None)
@given(st.lists(losses, max_size=100))
def test_losses_are_summed_to_within_one_ulp(values):
    right = math.fsum(values)
    assert abs(sum_with_ledger(values) - right) <= math.ulp(right)


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.lists(sizes, max_size=60), cancelling))
def test_signed_sums_are_within_one_ulp_and_second_order_terms(values):
    right = abs(sum(map(Fraction, values), Fraction(0)))
    most = 2 * UNIT * right + len(values) ** 2 * UNIT**2 * sum(abs(Fraction(value)) for value in values)
    assert error_of(values) <= most


def test_many_small_losses_after_a_large_one_are_not_lost():
    total = RunningSum().plus(1e9)
    for _ in range(100_000):
        total = total.plus(1e-8)
    assert abs(total.value() - (1e9 + 1e-3)) <= math.ulp(1e9)
    plain = 1e9
    for _ in range(100_000):
        plain += 1e-8
    assert plain == 1e9


def test_the_textbook_case():
    assert sum_with_ledger([1.0, 1e100, 1.0, -1e100]) == 2.0
