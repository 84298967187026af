import hashlib
import re
from collections.abc import Callable
from itertools import product

import pytest
from playwright.sync_api import expect

from deploy.telemetry.facts import Facts, SourceFacts
from tests.dashboard.conftest import Visit
from tests.support.dashboard_stand_in import DASHBOARD, MANY, Daemon

Open = Callable[..., Visit]
STATES = {
    "figures": Daemon(rounds=305),
    "empty": Daemon(pending=0, state="idle"),
    "token": Daemon(rounds=305, token="t"),
    "trainer down": Daemon(rounds=3, state="trainer_down"),
    "unwell": Daemon(rounds=305, facts=Facts(free_bytes=0, sources=(SourceFacts("x" * 60, "refused", 9.0),))),
    "pool": Daemon(rounds=305, learners=MANY, pool="pool"),
    "efficiency": Daemon(rounds=305, prefixes=(1, 2, 5, 10), proficiency=0.75),
    "long names": Daemon(rounds=30, learners=("ftml", "x" * 60), extra={"run": "/" + "long" * 40}),
}
INK = "(name) => import('/static/palette.js').then((palette) => palette.resolveColor(name))"


@pytest.mark.parametrize("width", [390, 768, 1024])
@pytest.mark.parametrize("state", STATES)
def test_nothing_is_wider_than_the_screen(visit: Open, state: str, width: int) -> None:
    shown = visit(STATES[state], width=width)
    shown.page.get_by_text("What am I looking at?").click()
    assert shown.page.evaluate("document.documentElement.scrollWidth") == width
    if width < 600:  # here each table row is a card, and all of it is visible
        for table in shown.page.locator(".scroll").all():
            assert table.evaluate("(one) => one.scrollWidth <= one.clientWidth")


def test_the_page_keeps_to_its_own_host_and_policy(visit: Open) -> None:
    shown = visit(Daemon(rounds=305))
    page = shown.page
    expect(page.locator('[data-chart="regret"] canvas')).to_be_visible()
    page.locator('[data-chart="learners"] .u-over').hover()
    page.locator('[data-chart="learners"] .entry').nth(1).click()
    page.locator('[data-action="theme"]').click()
    page.get_by_text("What am I looking at?").click()
    page.get_by_text("Last 100", exact=True).click()
    shown.daemon.rounds = 306
    shown.pass_time(2.1)
    shown.text("learned").to_have_text("306")
    assert shown.complaints == []
    assert {seen.split("?")[0] for seen in shown.daemon.seen} >= {"/", "/static/app.js", "/v1/status", "/v1/regret"}


def test_the_cursor_moves_in_all_charts_at_once(visit: Open) -> None:
    page = visit(Daemon(rounds=305)).page
    page.locator('[data-chart="adaptation"] .u-over').hover()
    when = page.locator('[data-chart="adaptation"] .when')
    expect(when).to_have_text(re.compile(r"^round 1\d\d$"))
    for name in ("learners", "regret", "accuracy"):
        expect(page.locator(f'[data-chart="{name}"] .when')).to_have_text(when.inner_text())


def test_a_chart_can_be_read_with_the_keyboard(visit: Open) -> None:
    shown = visit(Daemon(rounds=305))
    canvas = shown.page.locator('[data-chart="learners"] .canvas')
    canvas.focus()
    for key in ("End", "ArrowLeft", "ArrowLeft"):
        canvas.press(key)
    when = shown.page.locator('[data-chart="learners"] .when')
    expect(when).to_have_text("round 303")
    shown.text("announce").to_contain_text("round 303: FTML 0.")
    canvas.press("Escape")
    expect(when).to_have_text("latest: round 305")


def test_a_line_can_be_hidden_and_shown(visit: Open) -> None:
    page = visit(Daemon(rounds=305)).page
    canvas = page.locator('[data-chart="learners"] canvas')
    pixels = "(canvas) => canvas.toDataURL()"
    both = canvas.evaluate(pixels)
    entry = page.get_by_role("button", name="from scratch").first
    entry.press("Enter")
    expect(entry).to_have_attribute("aria-pressed", "false")
    assert canvas.evaluate(pixels) != both
    entry.press("Enter")
    expect(entry).to_have_attribute("aria-pressed", "true")


def luminance(color: str) -> float:
    """Return the relative luminance of "rgb(r, g, b)" as WCAG 2 defines it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_colours_have_enough_contrast(visit: Open, theme: str) -> None:
    page = visit(Daemon(rounds=3), theme=theme).page
    texts = ["text", "muted", "accent", "good", "warn", "bad"]
    pairs = [(text, ground, 4.5) for text, ground in product(texts, ["ground", "card"])]
    pairs += [(level, f"{level}-ground", 4.5) for level in ("good", "warn", "bad")]
    pairs += [("on-accent", "accent", 4.5), ("accent", "info-ground", 4.5)]
    pairs += [(f"ink-{ink}", "card", 3.0) for ink in [*range(7), "dark", "muted"]]
    found = {name: page.evaluate(INK, name) for pair in pairs for name in pair[:2]}
    low = {(a, b): contrast(found[a], found[b]) for a, b, least in pairs if contrast(found[a], found[b]) < least}
    assert low == {}


def test_the_theme_follows_the_system_and_a_choice_is_remembered(visit: Open) -> None:
    shown = visit(Daemon(rounds=305), theme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    assert luminance(shown.page.evaluate(ground)) < 0.05
    canvas = shown.page.locator('[data-chart="adaptation"] canvas')
    dark = canvas.evaluate("(canvas) => canvas.toDataURL()")
    shown.page.get_by_role("button", name="Switch to the light theme").click()
    assert luminance(shown.page.evaluate(ground)) > 0.8
    assert canvas.evaluate("(canvas) => canvas.toDataURL()") != dark
    shown.page.reload()
    assert luminance(shown.page.evaluate(ground)) > 0.8
    shown.page.get_by_role("button", name="Switch to the dark theme").click()
    assert luminance(shown.page.evaluate(ground)) < 0.05


def test_the_vendored_files_match_their_checksums() -> None:
    folder = DASHBOARD / "vendor" / "uplot"
    listed = dict(re.findall(r"`([\w.]+)` \| `([0-9a-f]{64})`", (folder / "VENDORED.md").read_text()))
    assert listed == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir() if file.suffix != ".md"
    }
