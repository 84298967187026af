"""The verdict and the pool on the page, also with some 20 answers."""

from collections.abc import Callable

import pytest
from playwright.sync_api import expect

from tests.dashboard.conftest import Visit
from tests.support.dashboard_stand_in import MANY, Daemon

Open = Callable[..., Visit]


def pooled(rounds: int = 305) -> Daemon:
    return Daemon(rounds=rounds, learners=MANY, pool="pool")


@pytest.mark.parametrize(
    ("daemon", "state", "colour"),
    [
        (pooled(), "pays", "good"),
        (Daemon(rounds=305, learners=("constant", "ftml@10")), "too_early", ""),
        (Daemon(rounds=305, learners=("ftml", "pooled_ridge", "pool"), pool="pool"), "does_not", "warn"),
        (Daemon(rounds=30), "too_early", ""),
    ],
    ids=["pays", "no meta-learner leads", "the weight is elsewhere", "few rounds"],
)
def test_the_page_shows_the_verdict(visit: Open, daemon: Daemon, state: str, colour: str) -> None:
    verdict = daemon.verdict()
    assert verdict["state"] == state, verdict["sentence"]
    shown = visit(daemon)
    shown.text("verdict").to_have_text(verdict["sentence"])
    shown.text("advice").to_have_text(verdict["advice"])
    expect(shown.page.locator('[data-panel="verdict"]')).to_have_attribute("data-verdict", colour)
    assert shown.complaints == []


def test_a_daemon_that_gives_no_verdict_has_no_card(visit: Open) -> None:
    shown = visit(Daemon(rounds=305, extra={"verdict": None}))
    shown.text("learned").to_have_text("305")
    expect(shown.page.locator('[data-panel="verdict"]')).to_be_hidden()
    expect(shown.page.locator('[data-chart="pool"]')).to_be_hidden()
    expect(shown.page.locator('[data-column="cost"]')).to_be_hidden()


def test_the_pool_and_what_has_weight_come_first_and_the_rest_is_collapsed(visit: Open) -> None:
    daemon = pooled()
    shown = visit(daemon)
    page, verdict = shown.page, daemon.verdict()
    heads = page.locator('[data-field="learners"] tr th')
    expect(heads).to_have_text(["pool", "FTML", "FTML with 10 steps", "pooled ridge", "hindsight (comparator)"])
    row = page.locator('[data-field="learners"] tr', has_text="FTML with 10 steps")
    expect(row).to_contain_text(f"{100 * verdict['weights']['ftml@10']:.1f}\u202f%")
    expect(row).to_contain_text("with FTML")
    ridge = page.locator('[data-field="learners"] tr', has_text="pooled ridge")
    expect(ridge).to_contain_text(f"{1000 * verdict['seconds_per_round']['pooled_ridge']:.1f}\u202fms")
    more = page.locator('[data-field="more-learners"]')
    expect(more).to_be_hidden()
    button = page.locator('[data-action="more"]')
    expect(button).to_have_text(f"Show {len(MANY) - 4} more answers")
    button.click()
    expect(more.locator("tr")).to_have_count(len(MANY) - 4)
    expect(more).to_be_visible()
    shown.daemon.rounds = 306
    shown.pass_time(2.1)
    shown.text("learned").to_have_text("306")
    expect(more).to_be_visible()
    expect(button).to_have_text("Show fewer answers")
    tile = page.locator('[data-field="regret"] dt')
    expect(tile.nth(1)).to_have_text("against pool")
    shown.text("loss").to_have_text(f"{daemon.learner('pool')['mean_loss_last_100']:.3f}")
    shown.text("loss-note").to_contain_text("FTML alone 0.3")
    assert shown.complaints == []


def test_the_charts_of_the_pool_show_its_regret_its_bound_and_its_weights(visit: Open) -> None:
    daemon = pooled()
    page = visit(daemon).page
    entries = page.locator('[data-chart="pool"] .entry')
    expect(entries).to_have_text([f"regret against the best expert+{0.4 * 305**0.3:.2f}", "bound+3.00"])
    clipped = visit(Daemon(rounds=305, learners=MANY, pool="pool", clipped=4.0)).page
    found = clipped.locator('[data-chart="pool"] .entry').last
    expect(found).to_have_text(f"regret without clipping+{0.4 * 305**0.3 + 4:.2f}")
    expect(clipped.locator('[data-chart="pool"] > .note')).to_contain_text("are those of clipped losses")
    expect(page.locator('[data-chart="weights"] .entry').first).to_contain_text("FTML with 10 steps")
    expect(page.locator('[data-chart="weights"] .entry').last).to_contain_text("others together")
    assert page.locator('[data-chart="weights"] .entry').count() <= 7


def test_lines_with_little_weight_can_be_shown(visit: Open) -> None:
    page = visit(pooled()).page
    chart = page.locator('[data-chart="learners"]')
    canvas = chart.locator("canvas")
    expect(chart.locator(".entry:visible")).to_have_count(4)
    before = canvas.evaluate("(canvas) => canvas.toDataURL()")
    chart.locator("summary").click()
    entry = chart.get_by_role("button", name="good embedding")
    expect(entry).to_have_attribute("aria-pressed", "false")
    entry.click()
    expect(entry).to_have_attribute("aria-pressed", "true")
    assert canvas.evaluate("(canvas) => canvas.toDataURL()") != before


@pytest.mark.parametrize("width", [400, 1280])
def test_with_many_answers_nothing_is_wider_than_the_screen(visit: Open, width: int) -> None:
    shown = visit(pooled(), width=width)
    shown.page.locator('[data-action="more"]').click()
    for summary in shown.page.locator(".more summary").all():
        summary.click()
    assert shown.page.evaluate("document.documentElement.scrollWidth") == width
