"""A real headless browser for tests of web pages: Debian's Chromium, driven by Playwright.

Needs the PyPI package ``playwright`` (its wheel carries the driver; no browser is downloaded) and Debian's package
``chromium``.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

FLAGS = (
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextmanager
def open_browser(*flags: str) -> Iterator[Browser]:
    """Start headless Chromium with a fresh profile and further ``flags``, and close it with all its pages.

    Yields:
        The browser; ``browser.new_page()`` returns a page with its own cookies and storage.

    Raises:
        FileNotFoundError: Chromium isn't installed.
    """
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        raise FileNotFoundError("no Chromium on the PATH: install it (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, chromium_sandbox=False, args=[*FLAGS, *flags])
        try:
            yield browser
        finally:
            browser.close()
