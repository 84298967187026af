"""How long ranks wait for each other."""

from trainers.distributed.process_group import (
    TIMEOUT_MAX_ROUNDS,
    TIMEOUT_MIN_ROUNDS,
    TIMEOUT_SLACK_SECONDS,
    AdaptiveTimeout,
)


def test_the_timeout_is_the_limit_until_enough_rounds_are_measured():
    timeout = AdaptiveTimeout(60.0)
    for _ in range(TIMEOUT_MIN_ROUNDS - 1):
        timeout.observe(0.1)
        assert (timeout.is_ready(), timeout.seconds()) == (False, 60.0)
    timeout.observe(2.0)
    assert (timeout.is_ready(), timeout.seconds()) == (True, 6.0 + TIMEOUT_SLACK_SECONDS)


def test_the_timeout_never_exceeds_the_limit_and_forgets_old_rounds():
    timeout = AdaptiveTimeout(20.0)
    timeout.observe(100.0)
    for _ in range(TIMEOUT_MIN_ROUNDS):
        timeout.observe(1.0)
    assert timeout.seconds() == 20.0
    for _ in range(TIMEOUT_MAX_ROUNDS):
        timeout.observe(1.0)
    assert timeout.seconds() == 3.0 + TIMEOUT_SLACK_SECONDS
