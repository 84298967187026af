"""How long ranks wait for each other."""

from trainers.distributed.process_group import (
    TIMEOUT_MAX_ROUNDS,
    TIMEOUT_MIN_ROUNDS,
    TIMEOUT_SLACK_SECONDS,
    AdaptiveTimeout,
)


def test_it_is_the_limit_until_it_is_known_how_long_rounds_take():
    patience = AdaptiveTimeout(60.0)
    for _ in range(TIMEOUT_MIN_ROUNDS - 1):
        patience.observe(0.1)
        assert (patience.is_ready(), patience.seconds()) == (False, 60.0)
    patience.observe(2.0)
    assert (patience.is_ready(), patience.seconds()) == (True, 6.0 + TIMEOUT_SLACK_SECONDS)


def test_it_is_never_more_than_the_limit_and_forgets_what_is_long_past():
    patience = AdaptiveTimeout(20.0)
    patience.observe(100.0)
    for _ in range(TIMEOUT_MIN_ROUNDS):
        patience.observe(1.0)
    assert patience.seconds() == 20.0
    for _ in range(TIMEOUT_MAX_ROUNDS):
        patience.observe(1.0)
    assert patience.seconds() == 3.0 + TIMEOUT_SLACK_SECONDS
