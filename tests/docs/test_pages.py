"""Everything that the pages show and name exists: configurations, modules, commands, make targets."""

import importlib
import re
import tomllib
from typing import Any

import pytest

from deploy.config.config import make_config
from tests.docs.pages import DOCS, ROOT, blocks_of

PAGES = {
    str(page.relative_to(ROOT)): page.read_text(encoding="utf-8")
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")))
    if page.parent.name != "results" or page.name == "README.md"  # the experiments render the tables
}
RUN: dict[str, dict[str, Any]] = {
    "run": {"path": "x"},
    "task": {"x_shape": [1], "y": "real", "y_shape": [1]},
    "model": {"build": "trainers.models:mlp", "args": {"inputs": 1, "outputs": 1}, "loss": "mse"},
}
RECIPES = re.compile("drifting_lines|follow_the_average|heavy_ball|logistic")  # which CONTRIBUTING adds
TOML = [
    pytest.param(page, block.text, id=f"{page}-{k}")
    for page, text in PAGES.items()
    for k, block in enumerate(blocks_of(text))
    if block.language == "toml" and not RECIPES.search(block.text)
]
NAME = re.compile(r"(?<![\w./-])(?:online_meta|streams|trainers|deploy)(?:\.[a-z_]\w*)+(?::\w+)?(?![\w/])")
FILES = re.compile(r"\.(py|toml|md|json|html|so)$")


@pytest.mark.parametrize(("page", "text"), TOML)
def test_each_toml_block_is_a_configuration(page: str, text: str) -> None:
    read = tomllib.loads(text)
    make_config({**RUN, **read, "run": {**RUN["run"], **read.get("run", {})}}, page)


def resolve(name: str) -> object:
    """Return the module, or its attribute, with a dotted name."""
    parts = name.replace(":", ".").split(".")
    found, at = importlib.import_module(parts[0]), 1
    while at < len(parts):
        try:
            found = importlib.import_module(".".join(parts[: at + 1]))
        except ModuleNotFoundError:
            break
        at += 1
    value: object = found
    for part in parts[at:]:
        value = getattr(value, part)
    return value


NO_MODULES = {
    "deploy.trainer",
    "online_meta.rules.heavy_ball",
    *(f"online_meta.{group}" for group in ("comparators", "engines", "metrics", "sources")),
}
"""A logger, the rule of a recipe, and groups of entry points."""


@pytest.mark.parametrize("page", PAGES)
def test_every_python_name_exists(page: str) -> None:
    for name in set(NAME.findall(PAGES[page])):
        if not FILES.search(name) and name not in NO_MODULES:
            assert resolve(name) is not None, f"{page} names {name}"


@pytest.mark.parametrize("page", PAGES)
def test_every_make_target_exists(page: str) -> None:
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8")))
    code = "\n".join(re.findall(r"`[^`\n]+`|^    .*$", PAGES[page], flags=re.MULTILINE))
    for target in re.findall(r"\bmake ([a-z][a-z-]*)", code):
        assert target in targets, f"{page} names make {target}"
