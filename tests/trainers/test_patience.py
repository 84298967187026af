"""How long ranks wait for each other."""

from trainers.patience import ROUNDS_BEFORE, ROUNDS_KEPT, SLACK_SECONDS, Patience


def test_it_is_the_limit_until_it_is_known_how_long_rounds_take():
    patience = Patience(60.0)
    for _ in range(ROUNDS_BEFORE - 1):
        patience.note(0.1)
        assert (patience.due(), patience.seconds()) == (False, 60.0)
    patience.note(2.0)
    assert (patience.due(), patience.seconds()) == (True, 6.0 + SLACK_SECONDS)


def test_it_is_never_more_than_the_limit_and_forgets_what_is_long_past():
    patience = Patience(20.0)
    patience.note(100.0)
    for _ in range(ROUNDS_BEFORE):
        patience.note(1.0)
    assert patience.seconds() == 20.0
    for _ in range(ROUNDS_KEPT):
        patience.note(1.0)
    assert patience.seconds() == 3.0 + SLACK_SECONDS
