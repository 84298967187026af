"""The learning efficiency on the page: its chart and its table column, both hidden unless configured."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from playwright.sync_api import Locator, expect

from tests.dashboard.conftest import Visit
from tests.support.dashboard_stand_in import Daemon
from tests.support.dashboard_states import mean_of_known

Open = Callable[..., Visit]
PREFIXES = (1, 2, 5, 10)
INKED = """(canvas, [from, to]) => {
  const [left, right] = [from, to].map((share) => Math.round(canvas.width * share));
  const { data } = canvas.getContext("2d").getImageData(left, 0, right - left, canvas.height);
  let inked = 0; // the first learner's ink is blue
  for (let i = 0; i < data.length; i += 4) inked += data[i + 3] > 0 && data[i + 2] > data[i] + 100;
  return inked;
}"""


@dataclass
class DaemonWithReachedRounds(Daemon):
    """A daemon with one learner that reaches the proficiency, a loss of 1, only in some rounds, with 2 points each."""

    reached: tuple[int, ...] = ()
    rounds: int = 15
    accuracy: bool = False
    learners: tuple[str, ...] = ("ftml",)
    prefixes: tuple[int, ...] = PREFIXES
    proficiency: float | None = 1.0

    def losses(self, name: str) -> list[float]:
        return [0.5 if round in self.reached else 1.5 for round in range(self.rounds)]


def chart(shown: Visit) -> Locator:
    return shown.page.locator('[data-chart="efficiency"]')


def heading(shown: Visit) -> Locator:
    return shown.page.locator('[data-column="points"]')


def test_the_points_needed_are_shown_for_every_learner(visit: Open) -> None:
    daemon = Daemon(rounds=305, prefixes=PREFIXES, proficiency=0.75)
    shown = visit(daemon)
    expect(chart(shown).locator("h3")).to_have_text("Learning efficiency: support points to 75\u202f% accuracy")
    expect(chart(shown).locator(".entry")).to_have_count(3)
    expect(chart(shown).locator(".note")).to_contain_text("Lines: mean of the last 20 rounds. Lower is better.")
    needed = daemon.efficiency_settings().needed(daemon.losses("ftml"))
    latest, last_100 = mean_of_known(needed[-20:]), mean_of_known(needed[-100:])
    assert latest is not None
    assert last_100 is not None
    expect(chart(shown).locator(".entry").first).to_have_text(f"FTML{latest:.2f}")
    expect(heading(shown)).to_have_text("Points to 75\u202f% accuracy, last 100")
    share = sum(points is not None for points in needed[-100:])
    rows = shown.page.locator('[data-field="learners"] tr')
    expect(rows.first).to_contain_text(f"{last_100:.2f} (reached in {share:.1f}\u202f%)")
    expect(rows.last.locator("td").nth(2)).to_have_text("\u2013")
    shown.page.get_by_text("What am I looking at?").click()
    expect(shown.page.locator(".about dt", has_text="Learning efficiency")).to_be_visible()
    expect(shown.page.get_by_text("if the line falls while the share of rounds")).to_be_visible()
    assert shown.complaints == []


def test_the_chart_is_hidden_unless_configured(visit: Open) -> None:
    shown = visit(Daemon(rounds=305))
    expect(shown.page.locator('[data-chart="regret"] canvas')).to_be_visible()
    expect(chart(shown)).to_be_hidden()
    expect(heading(shown)).to_be_hidden()
    expect(shown.page.locator('[data-field="learners"] tr').first.locator("td")).to_have_count(7)


def test_prefixes_alone_are_one_line_each_for_the_main_learner(visit: Open) -> None:
    daemon = Daemon(rounds=19, prefixes=(1, 5))  # too few rounds for smoothing: the latest value is the last round's
    shown = visit(daemon)
    expect(chart(shown).locator("h3")).to_have_text("Learning efficiency: FTML\u2019s loss by number of support points")
    last = [daemon.efficiency_settings().after(daemon.losses("ftml"), points)[-1] for points in (1, 5)]
    entries = [f"after 1 point{last[0]:.2f}", f"after 5 points{last[1]:.2f}"]
    expect(chart(shown).locator(".entry")).to_have_text(entries)
    expect(heading(shown)).to_be_hidden()


def test_a_proficiency_that_no_learner_reached_is_reported(visit: Open) -> None:
    shown = visit(Daemon(rounds=19, prefixes=PREFIXES, proficiency=0.999))
    expect(chart(shown).locator(".note")).to_contain_text(
        "No learner reached 99.9\u202f% accuracy in the rounds shown."
    )
    expect(chart(shown).locator(".entry")).to_have_count(4)
    expect(shown.page.locator('[data-field="learners"] tr').first).to_contain_text("never reached")


def test_rounds_without_the_proficiency_leave_a_gap(visit: Open) -> None:
    shown = visit(DaemonWithReachedRounds(reached=(0, 1, 2, 3, 11, 12)))
    canvas = chart(shown).locator("canvas")
    expect(canvas).to_be_visible()
    assert canvas.evaluate(INKED, [0.0, 0.3]) > 50
    assert canvas.evaluate(INKED, [0.4, 0.7]) == 0
    entry = chart(shown).locator(".entry")
    expect(entry).to_have_text("FTML2.00 at round 13")
    walked = chart(shown).locator(".canvas")
    for key in ("Home", "ArrowRight"):
        walked.press(key)
    expect(entry).to_have_text("FTML2.00")
    walked.press("End")
    expect(entry).to_have_text("FTML\u2013")


def test_a_mean_skips_rounds_that_did_not_reach_the_proficiency(visit: Open) -> None:
    shown = visit(DaemonWithReachedRounds(rounds=40, reached=(20,)))
    expect(chart(shown).locator(".note")).to_contain_text("mean of the last 5 rounds")
    expect(chart(shown).locator(".entry")).to_have_text("FTML2.00 at round 25")


def test_a_single_round_with_the_proficiency_is_a_dot(visit: Open) -> None:
    canvas = chart(visit(DaemonWithReachedRounds(reached=(7,)))).locator("canvas")
    expect(canvas).to_be_visible()
    assert canvas.evaluate(INKED, [0.4, 0.7]) > 5


@pytest.mark.parametrize(
    ("daemon", "last"),
    [
        (Daemon(rounds=60, prefixes=PREFIXES), "efficiency"),
        (Daemon(rounds=60, prefixes=PREFIXES, accuracy=False), None),
        (Daemon(rounds=60), None),
        (Daemon(rounds=60, accuracy=False), "regret"),
    ],
    ids=["five", "four without accuracy", "four", "three"],
)
def test_the_last_of_an_odd_number_of_charts_fills_its_row(visit: Open, daemon: Daemon, last: str | None) -> None:
    page = visit(daemon).page
    expect(page.locator('[data-chart="regret"] canvas')).to_be_visible()
    widths = "(all) => all.filter((one) => one.clientWidth > 1000).map((one) => one.dataset.chart)"
    assert page.locator(".chart").evaluate_all(widths) == ([] if last is None else [last])
