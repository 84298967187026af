from collections.abc import Callable

from playwright.sync_api import expect

from tests.dashboard.conftest import Visit
from tests.support.dashboard_stand_in import Daemon

Open = Callable[..., Visit]


def test_the_page_shows_the_daemons_numbers(visit: Open) -> None:
    daemon = Daemon(rounds=305)
    shown = visit(daemon)
    status = daemon.status()
    shown.text("learned").to_have_text("305")
    shown.text("learned-note").to_have_text("of 312 ingested")
    shown.text("state").to_have_text("Running")
    shown.text("version").to_have_text("v0.1.0")
    shown.text("run").to_contain_text("runs/demo · up 3\u202fh 12\u202fm")
    shown.text("loss").to_have_text(f"{status['learners']['ftml']['mean_loss_last_100']:.3f}")
    shown.text("loss-trend").to_contain_text("down")
    shown.text("accuracy").to_have_text(f"{status['learners']['ftml']['mean_accuracy_last_100'] * 100:.1f}\u202f%")
    shown.text("pace-rates").to_have_text("2.4/s learned, 2.6/s arriving")
    shown.text("pace-pending").to_have_text("7 of 1,000 pending, oldest 3.1\u202fs")
    shown.text("checkpoint").to_contain_text("s ago")
    shown.text("checkpoint-note").to_have_text("of round 300; 5 rounds since")
    rows = shown.page.locator('[data-field="learners"] tr')
    expect(rows).to_have_count(4)
    expect(rows.nth(0)).to_contain_text("FTML")
    expect(rows.nth(1)).to_contain_text(f"{status['learners']['train_on_everything']['cumulative_loss']:.1f}")


def test_the_page_follows_the_daemon(visit: Open) -> None:
    shown = visit(Daemon(rounds=305))
    latest = shown.page.locator('[data-chart="adaptation"] .when')
    expect(latest).to_have_text("latest: round 305")
    shown.daemon.rounds = 311
    shown.pass_time(2.1)
    shown.text("learned").to_have_text("311")
    expect(latest).to_have_text("latest: round 311")
    shown.daemon.pending = 0
    shown.pass_time(2.1)
    shown.text("pace").to_have_text("Up to date")


def test_the_ledger_is_fetched_only_when_it_has_changed(visit: Open) -> None:
    shown = visit(Daemon(rounds=60, pending=0, state="idle"))
    shown.text("learned").to_have_text("60")
    before = len(shown.asked("/v1/status"))
    shown.pass_time(2.1)
    shown.daemon.extra = {"version": "next"}
    shown.pass_time(2.1)
    shown.text("version").to_have_text("vnext")
    assert len(shown.asked("/v1/status")) > before
    assert len(shown.asked("/v1/regret")) == 1


def test_regret_is_also_given_in_words(visit: Open) -> None:
    shown = visit(Daemon(rounds=305))
    ahead = -shown.daemon.regrets()["from_scratch"]["value"]
    regret = shown.page.locator('[data-field="regret"]')
    expect(regret).to_contain_text(f"FTML is ahead by {ahead:.1f}")
    expect(regret).to_contain_text(f"\u2212{ahead:.1f}")
    expect(regret).to_contain_text("estimate, a lower bound, as of round 300")
    note = shown.page.locator('[data-chart="regret"] > .note')
    expect(note).to_contain_text("Negative against a baseline: FTML lost less.")
    expect(note).to_contain_text("upper bound of the true minimum, so the regret shown against it is a lower bound")
    expect(note).to_contain_text("as of round 300")
    shown.page.get_by_text("What am I looking at?").click()
    expect(shown.page.get_by_text("Negative means that FTML lost less")).to_be_visible()


def test_a_leading_baseline_is_reported(visit: Open) -> None:
    entry = {
        "value": 12.5,
        "standard_error": 3.0,
        "as_of_round": 60,
        "rounds": 60,
        "kind": "baseline",
        "interval": [2.5, 22.5],
        "verdict": "behind",
    }
    shown = visit(Daemon(rounds=60, extra={"regret": {"from_scratch": entry}}))
    expect(shown.page.locator('[data-field="regret"]')).to_contain_text("FTML is behind by 12.5")


def test_regret_in_the_chart_is_the_difference_of_cumulative_losses(visit: Open) -> None:
    shown = visit(Daemon(rounds=305))
    own, other = (sum(shown.daemon.losses(name)) for name in ("ftml", "from_scratch"))
    entry = shown.page.locator('[data-chart="regret"] .entry', has_text="from scratch")
    expect(entry.locator(".value")).to_have_text(f"\u2212{other - own:.1f}")
    hindsight = shown.page.locator('[data-chart="regret"] .entry', has_text="hindsight")
    expect(hindsight.locator(".value")).to_have_text(f"+{shown.daemon.points()[-1]['regret']:.1f} at round 300")


def test_any_learners_and_comparators_are_shown(visit: Open) -> None:
    names = ("ftml", "one", "two", "three", "four", "five", "six", "a_name_of_some_length")
    kinds = ("dynamic", "hindsight", "novel_kind")
    shown = visit(Daemon(rounds=1500, accuracy=False, learners=names, comparators=kinds))
    expect(shown.page.locator('[data-field="learners"] tr')).to_have_count(11)
    expect(shown.page.locator('[data-chart="learners"] .entry')).to_have_count(8)
    expect(shown.page.locator('[data-chart="regret"] .entry')).to_have_count(10)
    expect(shown.page.locator('[data-field="regret"]')).to_contain_text("and 6 more in the table")
    expect(shown.page.locator('[data-chart="accuracy"]')).to_be_hidden()
    expect(shown.page.locator('[data-tile="accuracy"]')).to_be_hidden()
    assert shown.complaints == []


def test_accuracy_is_shown_for_every_learner_that_has_it(visit: Open) -> None:
    shown = visit(Daemon(rounds=19))  # too few rounds for smoothing: the latest value is the last round's own
    entries = shown.page.locator('[data-chart="accuracy"] .entry')
    expect(entries).to_have_count(3)
    last = shown.daemon.accuracies("from_scratch")[-1]
    expect(entries.nth(2)).to_contain_text(f"{last * 100:.1f}\u202f%")


def test_a_name_is_never_markup(visit: Open) -> None:
    name = '<img src="x">'
    shown = visit(Daemon(rounds=30, learners=("ftml", name), extra={"run": name}))
    shown.text("run").to_contain_text(name)
    expect(shown.page.locator('[data-field="learners"]')).to_contain_text(name)
    assert shown.page.locator('img[src="x"]').count() == 0


def test_the_range_control_requests_the_last_rounds(visit: Open) -> None:
    shown = visit(Daemon(rounds=1305))
    note = shown.page.locator('[data-chart="adaptation"] > .note')
    expect(note).to_contain_text("means of 4 rounds")
    shown.page.get_by_text("Last 100", exact=True).click()
    expect(note).to_contain_text("dots: single rounds")
    assert "from=1205" in shown.asked("/v1/regret")[-1]
    shown.page.get_by_text("Last 1,000").click()
    expect(note).to_contain_text("means of 3 rounds")
    assert "from=305" in shown.asked("/v1/regret")[-1]


def test_the_newest_rounds_entity_is_named(visit: Open) -> None:
    daemon = Daemon(rounds=305)
    daemon.extra = {"last": {**daemon.last(304), "entity": "Café 7"}}
    visit(daemon).text("learned-note").to_have_text("of 312 ingested; the last one of Café 7")
