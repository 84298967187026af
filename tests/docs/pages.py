"""The hand-written pages of the documentation, and the code blocks in them."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FENCE = re.compile(r'^```(\w+)(?: title="([^"]*)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced code block: its ``language``, its ``title`` ("" for none) and its ``text``."""

    language: str
    title: str
    text: str


def read_page(name: str) -> str:
    """Return the text of a page, by its path below ``docs/``, such as "how-to/sources.md"."""
    return (DOCS / name).read_text(encoding="utf-8")


def blocks_of(text: str) -> list[Block]:
    """Return the fenced code blocks of a page, in order."""
    return [Block(*found) for found in FENCE.findall(text)]


def code_of(text: str, language: str) -> list[str]:
    """Return the text of a page's blocks in one language, in order."""
    return [block.text for block in blocks_of(text) if block.language == language]


def shape(line: str) -> str:
    """Return a line of output without what differs between runs: numbers, file names, padding."""
    line = re.sub(r"\d{8}T\S+\.body", "FILE", line)
    line = re.sub(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?", "N", line)
    return re.sub(r"\s+", " ", line).strip()


def assert_shown(shown: str, printed: str) -> None:
    """Compare a block of output with what was printed, in shape; a line of three dots stands for lines left out."""
    lines = iter([shape(line) for line in printed.splitlines()])
    for line in shown.splitlines():
        if line != "...":
            assert shape(line) in lines, f"{line!r} is missing, or in another order, in:\n{printed}"
