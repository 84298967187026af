"""The table of reasons, the code that gives them, and the page that explains them agree."""

import ast
import re
from pathlib import Path

import streams
from deploy.server.app import REJECTION_STATUS
from streams.formats.wire import _EMPTY_REASONS
from streams.spec import Limits
from streams.types import REASONS

PAGE = (Path(streams.__path__[0]).parent / "docs/how-to/bad-input.md").read_text(encoding="utf-8")


GIVEN_BEFORE = ("QUARANTINED", "error.reason", "refused['reason']")
"""Reasons of a task that was accepted before, of another error, and of the process that answers."""


def reasons_given(folder: Path) -> set[str]:
    """Return the first argument of every ``Rejected(...)`` call in a folder."""
    found = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "Rejected":
                reason = node.args[0]
                if isinstance(reason, ast.Constant):
                    found.add(reason.value)
                elif ast.unparse(reason) not in GIVEN_BEFORE:
                    assert ast.unparse(reason) == "_EMPTY_REASONS[part]", f"{file}: {ast.unparse(node)}"
    return found


def test_the_table_has_exactly_the_reasons_in_the_code() -> None:
    root = Path(streams.__path__[0])
    floors = (root, root.parent / "trainers", root.parent / "deploy")
    given = set(_EMPTY_REASONS.values()).union(*map(reasons_given, floors))
    assert given == set(REASONS)


def test_the_page_lists_every_reason_with_its_status_and_meaning() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (4\d\d) \| (.+) \|$", PAGE, flags=re.MULTILINE)
    assert [(reason, meaning) for reason, _, meaning in rows] == list(REASONS.items())
    for reason, status, _ in rows:
        assert int(status) == (409 if reason == "conflict" else REJECTION_STATUS.get(reason, 422))


def test_the_page_lists_every_limit_with_its_default() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \|", PAGE, flags=re.MULTILINE)
    limits = {key: int(value) for key, value in rows if key not in REASONS}
    assert limits == vars(Limits())
