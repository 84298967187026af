import json
import re
from collections.abc import Callable

import pytest
from playwright.sync_api import expect

from deploy.telemetry.facts import Facts, ProcessFacts, SourceFacts, WindowFacts
from tests.dashboard.conftest import Visit
from tests.support.dashboard_stand_in import Daemon, serve

Open = Callable[..., Visit]


def test_before_the_first_round_the_page_explains_how_to_submit(visit: Open) -> None:
    shown = visit(Daemon(pending=0, state="idle"))
    expect(shown.page.get_by_role("heading", name="No rounds yet")).to_be_visible()
    shown.text("command").to_have_text(f"online-meta submit FILE... --url {shown.origin}")
    expect(shown.page.locator('[data-panel="charts"]')).to_be_hidden()
    shown.daemon.rounds, shown.daemon.state = 1, "running"
    shown.pass_time(2.1)
    expect(shown.page.locator('[data-chart="adaptation"] canvas')).to_be_visible()
    expect(shown.page.locator('[data-panel="empty"]')).to_be_hidden()
    assert shown.complaints == []


@pytest.mark.parametrize("token", [None, "secret"])
def test_before_the_first_round_the_page_shows_a_command_with_the_shapes_of_the_run(
    visit: Open, token: str | None
) -> None:
    example = {"support_x": [[0.3, -0.5]], "support_y": [1], "query_x": [[0.1, 1]], "query_y": [0]}
    shown = visit(Daemon(pending=0, state="idle", extra={"example": example}, token=token))
    if token is not None:
        shown.page.get_by_label("Bearer token").fill(token)
        shown.page.get_by_role("button", name="Connect").click()
    bearer = "" if token is None else ' -H "Authorization: Bearer $TOKEN"'
    command = f"curl {shown.origin}/v1/tasks{bearer} -H 'Content-Type: application/json'"
    shown.text("example").to_have_text(f"{command} -d '{json.dumps(example, separators=(',', ':'))}'")
    shown.page.locator('[data-action="copy-example"]').click()
    expect(shown.page.locator('[data-action="copy-example"]')).to_have_text(re.compile("Copied|Selected"))
    shown.daemon.rounds, shown.daemon.extra = 1, {}
    shown.pass_time(2.1)
    expect(shown.page.locator('[data-panel="example"]')).to_be_hidden()


def test_a_long_example_is_sent_from_where_the_daemon_serves_it(visit: Open) -> None:
    shown = visit(Daemon(pending=0, state="idle", extra={"example": None}))
    command = f"curl {shown.origin}/v1/tasks -H 'Content-Type: application/json'"
    shown.text("example").to_have_text(f"curl -s {shown.origin}/v1/examples/tasks | {command} --data-binary @-")


def test_a_lost_connection_is_reported_and_the_figures_stay(visit: Open) -> None:
    daemon = Daemon(rounds=305)
    with serve(daemon) as port:
        shown = visit(daemon, port=port)
        shown.text("learned").to_have_text("305")
    banner = shown.page.locator('[data-banner="lost"]')
    shown.pass_time(2.1)
    expect(banner).to_be_visible()
    expect(banner).to_contain_text("Connection lost.")
    expect(banner).to_contain_text("The figures below are those of")
    expect(banner).to_contain_text("Trying again")
    shown.text("state").to_have_text("No connection")
    shown.text("learned").to_have_text("305")
    daemon.rounds = 310
    with serve(daemon, port):
        for _ in range(3):  # an attempt in progress may have failed once more
            shown.pass_time(31)
        expect(banner).to_be_hidden()
        shown.text("learned").to_have_text("310")
        shown.text("state").to_have_text("Running")


def test_the_button_reconnects_at_once(visit: Open) -> None:
    daemon = Daemon(rounds=305)
    with serve(daemon) as port:
        shown = visit(daemon, port=port)
    banner = shown.page.locator('[data-banner="lost"]')
    shown.pass_time(2.1)
    expect(banner).to_be_visible()
    with serve(daemon, port):
        shown.page.get_by_role("button", name="Try now").click()
        expect(banner).to_be_hidden()


def test_the_page_asks_for_the_token_and_sends_it(visit: Open) -> None:
    shown = visit(Daemon(rounds=305, token="correct horse"))
    form = shown.page.locator('[data-panel="token"]')
    expect(form).to_be_visible()
    expect(shown.page.get_by_label("Bearer token")).to_be_focused()
    expect(shown.page.locator('[data-panel="figures"]')).to_be_hidden()
    asked = len(shown.asked("/v1/"))
    shown.pass_time(60)
    shown.page.get_by_label("Bearer token").fill("wrong")
    shown.page.get_by_role("button", name="Connect").click()
    shown.text("token-error").to_have_text("The daemon rejected this token.")
    assert len(shown.asked("/v1/")) == asked + 1  # no request is sent while the form waits
    shown.page.get_by_label("Bearer token").fill("correct horse")
    shown.page.get_by_label("Bearer token").press("Enter")
    shown.text("learned").to_have_text("305")
    expect(form).to_be_hidden()
    shown.page.reload()
    shown.text("learned").to_have_text("305")
    stored = shown.page.evaluate("[{...sessionStorage}, {...localStorage}, document.cookie]")
    assert stored == [{"online-meta.token": "correct horse"}, {}, ""]


def test_a_stopped_trainer_is_reported(visit: Open) -> None:
    shown = visit(Daemon(rounds=305, state="trainer_down"))
    notice = shown.page.locator('[data-banner="notice"]')
    expect(notice).to_contain_text("Trainer down. It ended 3 s ago and has not come back.")
    shown.text("state").to_have_text("Trainer down")
    shown.text("run").to_contain_text("trainer restarted 2 times")
    shown.daemon.state = "running"
    shown.pass_time(2.1)
    expect(notice).to_be_hidden()


@pytest.mark.parametrize(
    ("daemon", "notice"),
    [
        (Daemon(rounds=60, state="draining"), "Draining."),
        (Daemon(rounds=60, pending=1000), "New tasks get status 429"),
        (
            Daemon(rounds=60, pending=900),
            "900 of 1,000 tasks are pending. At this rate it will be full in 8\u202fm 20\u202fs.",
        ),
    ],
    ids=["draining", "full", "nearly full"],
)
def test_states_that_need_attention_are_reported(visit: Open, daemon: Daemon, notice: str) -> None:
    expect(visit(daemon).page.locator('[data-banner="notice"]')).to_contain_text(notice)


def test_a_failing_check_is_shown_everywhere_and_nothing_is_green(visit: Open) -> None:
    shown = visit(Daemon(rounds=305))
    pill, health = shown.page.locator(".pill"), shown.page.locator('[data-panel="health"]')
    green = shown.page.locator('.figure[data-level="good"]')
    shown.text("pace").to_have_text("Keeping up")
    expect(green).to_have_count(1)
    shown.text("health-summary").to_have_text("Health: all is well")
    expect(health).not_to_have_attribute("open", "")
    shown.daemon.facts = Facts(free_bytes=0, sources=(SourceFacts("queue", "refused", 9.0),))
    shown.pass_time(2.1)
    expect(pill).to_have_attribute("data-health", "fail")
    shown.text("state").to_have_text("2 checks fail")
    notice = shown.page.locator('[data-banner="notice"]')
    expect(notice).to_contain_text("Disk fails. 0 MiB of 200.0 GiB are free. Free space on the disk of the run.")
    expect(notice).to_contain_text("Source queue fails. Cannot be read for 9 s: refused.")
    shown.text("pace").to_have_text("Not well")
    expect(green).to_have_count(0)
    colours = "(one) => [getComputedStyle(one).color, getComputedStyle(document.querySelector('.note')).color]"
    trend = shown.page.locator('[data-field="loss-trend"]')
    assert len(set(trend.evaluate(colours))) == 1, "the falling loss is not praised"
    shown.text("health-summary").to_have_text("Health: 2 of 16 checks need attention")
    expect(health).to_have_attribute("open", "")
    first = health.locator("tbody tr").first
    expect(first).to_contain_text("Disk")
    expect(first).to_contain_text("fails")
    shown.daemon.facts = Facts()
    shown.pass_time(2.1)
    shown.text("state").to_have_text("Running")
    shown.text("pace").to_have_text("Keeping up")
    expect(notice).to_be_hidden()
    assert shown.complaints == []


@pytest.mark.parametrize(
    ("daemon", "pill", "pace"),
    [
        (Daemon(rounds=60, pending=383, facts=Facts(stalled_seconds=45)), "Progress fails", "Stopped"),
        (Daemon(rounds=60, facts=Facts(deaths=2)), "Restarts fail", "Stopped"),
        (
            Daemon(rounds=60, facts=Facts(trainer=ProcessFacts(suspended=True, silent_seconds=9))),
            "Trainer fails",
            "Stopped",
        ),
        (Daemon(rounds=60, facts=Facts(last=WindowFacts(100, rollbacks=2))), "Divergence fails", "Not well"),
        (Daemon(rounds=60, facts=Facts(last=WindowFacts(100, rollbacks=1))), "1 warning", "Keeping up"),
        (Daemon(pending=0, state="idle", facts=Facts(published=False)), "Starting", "Up to date"),
    ],
    ids=["stalled", "restarting", "stopped", "diverged", "rolled back", "starting"],
)
def test_the_pill_and_the_pace_follow_the_health(visit: Open, daemon: Daemon, pill: str, pace: str) -> None:
    shown = visit(daemon)
    shown.text("state").to_have_text(pill)
    shown.text("pace").to_have_text(pace)


def test_a_hidden_tab_sends_no_requests(visit: Open) -> None:
    shown = visit(Daemon(rounds=305))
    shown.text("learned").to_have_text("305")
    turn = "(hidden) => { Object.defineProperty(document, 'hidden', {value: hidden, configurable: true});"
    turn += "document.dispatchEvent(new Event('visibilitychange')); }"
    shown.page.evaluate(turn, True)
    asked = len(shown.daemon.seen)
    for _ in range(5):
        shown.pass_time(2.1)
    assert len(shown.daemon.seen) == asked
    shown.daemon.rounds = 306
    shown.page.evaluate(turn, False)
    shown.text("learned").to_have_text("306")
