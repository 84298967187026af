"""The dashboard as the daemon serves it, in a real browser while tasks arrive."""

import json
import subprocess
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, expect

from tests.support.browser import open_browser
from tests.support.daemon import running_daemon, write_sinusoid


def record_requests_and_errors(page: Page) -> tuple[list[str], list[str]]:
    """Return two lists that record the page's requests and console errors from now on."""
    requests: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    return requests, errors


def test_the_dashboard_follows_the_run(tmp_path: Path) -> None:
    with running_daemon(write_sinusoid(tmp_path)) as daemon, open_browser() as browser:
        page = browser.new_page()
        requests, errors = record_requests_and_errors(page)
        page.goto(daemon.url)
        expect(page.get_by_text("online-meta submit")).to_be_visible(timeout=90_000)
        daemon.submit(*range(7))
        daemon.wait_until_learned(7)
        expect(page.get_by_text("of 7 ingested")).to_be_visible(timeout=90_000)
        daemon.wait_until_compared(7)
        expect(page.get_by_text("against hindsight").first).to_be_visible(timeout=90_000)
        expect(page.get_by_text("from scratch").first).to_be_visible()
        daemon.submit(*range(12))
        daemon.wait_until_learned(12)
        expect(page.get_by_text("of 12 ingested")).to_be_visible(timeout=90_000)
        assert page.locator("canvas").count() >= 3, "the charts are drawn"
        assert [url for url in requests if not url.startswith(daemon.url)] == []
        assert errors == []


def run_line(line: str) -> dict[str, Any]:
    """Run a command as a reader would who copies it; return the JSON that it prints."""
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_pages_show_commands_that_work_and_the_api_page_contacts_no_other_host(tmp_path: Path) -> None:
    with running_daemon(write_sinusoid(tmp_path)) as daemon, open_browser() as browser:
        page = browser.new_page()
        requests, errors = record_requests_and_errors(page)
        page.goto(daemon.url)
        line = page.locator('[data-field="example"]')
        expect(line).to_contain_text("support_x", timeout=90_000)
        expect(line).to_be_visible()
        assert run_line(line.inner_text())["round"] == 0
        page.goto(f"{daemon.url}/docs")
        expect(page.get_by_text("/v1/tasks", exact=True).first).to_be_visible(timeout=90_000)
        page.locator("#operations-default-adapt_v1_adapt_post button.opblock-summary-control").click()
        line = page.locator("#operations-default-adapt_v1_adapt_post pre code").first
        expect(line).to_contain_text("curl http")
        daemon.wait_until_learned(1)
        assert len(run_line(line.inner_text())["predictions"]) == 2
        assert [url for url in requests if not url.startswith((daemon.url, "data:"))] == []
        assert errors == []
