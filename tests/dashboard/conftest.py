"""A browser, and pages that record errors, refused content, and requests to other hosts."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.support.browser import open_browser
from tests.support.dashboard_stand_in import Daemon, serve

expect.set_options(timeout=60_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


@dataclass
class Visit:
    """A page open on a daemon's dashboard, and the problems found in it."""

    page: Page
    daemon: Daemon
    origin: str
    complaints: list[str]

    def text(self, name: str) -> Any:
        """Return an assertion on the field ``name`` that waits until it holds."""
        return expect(self.page.locator(f'[data-field="{name}"]'))

    def pass_time(self, seconds: float) -> None:
        """Run the page's timers as if this many seconds had passed."""
        self.page.clock.fast_forward(int(seconds * 1000))

    def asked(self, path: str) -> list[str]:
        return [seen for seen in self.daemon.seen if seen.startswith(path)]


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Visit]]:
    with ExitStack() as stack:

        def start(
            daemon: Daemon, width: int = 1440, theme: Literal["light", "dark"] = "light", port: int | None = None
        ) -> Visit:
            port = stack.enter_context(serve(daemon)) if port is None else port
            context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)
            stack.callback(context.close)
            page = context.new_page()
            visit = Visit(page, daemon, f"http://127.0.0.1:{port}", [])
            record_problems(visit)
            page.clock.install()
            page.goto(visit.origin + "/")
            expect(page.locator('.pill:not([data-state="connecting"])')).to_be_visible()
            return visit

        yield start


def record_problems(visit: Visit) -> None:
    def check(url: str) -> None:
        if not url.startswith(visit.origin + "/"):
            visit.complaints.append(f"asked another host: {url}")

    visit.page.on("request", lambda request: check(request.url))
    visit.page.on("console", lambda message: visit.complaints.append(f"console: {message.text}"))
    visit.page.on("pageerror", lambda error: visit.complaints.append(f"error: {error}"))
