"""Pages of other origins in a real browser can neither post a task to the daemon nor read from it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import httpx
from playwright.sync_api import Browser, Page

from tests.support.browser import open_browser
from tests.support.daemon import Daemon, running_daemon, sinusoid, wait_for, write_sinusoid

RESOLVER = "--host-resolver-rules=MAP page.example 127.0.0.1, MAP rebound.example 127.0.0.1"

POST = """async ([url, body, type, mode]) => {
  const blob = new Blob([new Uint8Array(body)]);
  const headers = type ? { "Content-Type": type } : {};
  try {
    return (await fetch(url, { method: "POST", body: blob, headers, mode })).type;
  } catch (error) {
    return error.name;
  }
}"""

READ = """async (url) => {
  try {
    return await (await fetch(url)).text();
  } catch (error) {
    return error.name;
  }
}"""

SUBMIT_FORM = """([url, enctype]) => {
  const form = Object.assign(document.createElement("form"), { method: "POST", action: url, enctype });
  form.append(Object.assign(document.createElement("input"), { name: "support_x", value: "1" }));
  document.body.append(form);
  form.submit();
}"""


@contextmanager
def serving_page(folder: Path) -> Iterator[str]:
    """Serve an empty page from another origin than the daemon's; yield its address."""
    (folder / "index.html").write_text("<!doctype html><title>Another site</title>")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(folder))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://page.example:{server.server_port}/"
        server.shutdown()


def post_from_page(page: Page, daemon: Daemon) -> None:
    """Post a task in each way that needs no preflight, and in those that do."""
    url, body = f"{daemon.url}/v1/tasks", list(sinusoid(0))
    failures: list[str | None] = []
    page.on("requestfailed", lambda request: failures.append(request.failure))
    sendable = (None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data")
    for media_type in sendable:
        assert page.evaluate(POST, [url, body, media_type, "no-cors"]) == "TypeError"
    # The daemon has received and refused these; its answers are kept from the page.
    assert failures == ["net::ERR_BLOCKED_BY_RESPONSE.NotSameOrigin"] * len(sendable)
    for media_type in sendable:
        assert page.evaluate(POST, [url, body, media_type, "cors"]) == "TypeError"
    for media_type in ("application/octet-stream", "application/vnd.safetensors"):
        assert page.evaluate(POST, [url, body, media_type, "cors"]) == "TypeError", "the preflight gets no permission"


def submit_forms(browser: Browser, address: str, daemon: Daemon) -> None:
    """Submit forms to the daemon; the browser then shows its answer."""
    for encoding in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        page = browser.new_page()
        page.goto(address)
        with page.expect_response(f"{daemon.url}/v1/tasks") as answer:
            page.evaluate(SUBMIT_FORM, [f"{daemon.url}/v1/tasks", encoding])
        assert answer.value.status == 403
        page.close()


def test_foreign_pages_can_neither_post_nor_read(tmp_path: Path) -> None:
    config = write_sinusoid(tmp_path)
    without_comparators = ("regret.comparator=[]", "regret.baselines=[]")
    with running_daemon(config, *without_comparators) as daemon, serving_page(tmp_path) as address:
        wait_for("the weights are published", lambda: daemon.client.get("/v1/weights").is_success)
        with open_browser(RESOLVER) as browser:
            page = browser.new_page()
            page.goto(address)
            post_from_page(page, daemon)
            for path in ("/v1/weights", "/v1/status", "/metrics"):
                assert page.evaluate(READ, f"{daemon.url}{path}") == "TypeError"
            submit_forms(browser, address, daemon)

            rebound = f"http://rebound.example:{httpx.URL(daemon.url).port}"
            answer = page.goto(f"{rebound}/")
            assert answer is not None
            assert answer.status == 421
            for path in ("/v1/weights", "/v1/status", "/metrics"):
                assert "unknown_host" in page.evaluate(READ, f"{rebound}{path}"), "same origin, so the page reads this"
            assert page.evaluate(POST, [f"{rebound}/v1/tasks", list(sinusoid(0)), "application/octet-stream", "cors"])

            assert daemon.status()["rounds"]["ingested"] == 0
            page.goto(daemon.url)
            own = [f"{daemon.url}/v1/tasks", list(sinusoid(0)), "application/octet-stream", "cors"]
            assert page.evaluate(POST, own) == "basic"
            assert daemon.status()["rounds"]["ingested"] == 1, "the daemon's own page can post"
