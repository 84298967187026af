"""The recent growth rate of a count."""

from deploy.server.state import WINDOW_SECONDS, RecentRate


def test_the_rate_covers_the_window_only() -> None:
    now = 0.0
    rate = RecentRate(lambda: now)
    assert rate.per_second() == 0.0
    rate.record(10)
    assert rate.per_second() == 0.0
    now = 2.0
    rate.record(16)
    assert rate.per_second() == 3.0
    for _ in range(100):  # a long pause: growth from before the window no longer counts
        now += WINDOW_SECONDS / 10
        rate.record(16)
    assert rate.per_second() == 0.0
