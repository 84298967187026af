"""How fast a count grows, lately."""

from deploy.server.state import WINDOW_SECONDS, RecentRate


def test_the_rate_is_that_of_the_window() -> None:
    now = 0.0
    rate = RecentRate(lambda: now)
    assert rate.per_second() == 0.0
    rate.record(10)
    assert rate.per_second() == 0.0
    now = 2.0
    rate.record(16)
    assert rate.per_second() == 3.0
    for _ in range(100):  # a long rest: what was before the window counts no more
        now += WINDOW_SECONDS / 10
        rate.record(16)
    assert rate.per_second() == 0.0
