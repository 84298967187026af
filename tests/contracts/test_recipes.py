"""The recipes of CONTRIBUTING.md work as written: one new file each, and no edit elsewhere."""

import re
import shutil
import subprocess
import sys

import pytest

from tests.house.sources import FLOORS, ROOT

FENCE = re.compile(r"^```python\n# (\S+\.py)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RECIPES = dict(FENCE.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))
MOST_LINES = 80


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Return a copy of the project that includes the files of the recipes."""
    copy = tmp_path_factory.mktemp("copy") / "project"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "runs", "build", "*.egg-info"))
    for place, code in RECIPES.items():
        (copy / place).write_text(code, encoding="utf-8")
    return copy


def run(project, *command):
    """Run a Python module in the copy; return its exit code and output."""
    done = subprocess.run([sys.executable, "-m", *command], cwd=project, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_there_is_one_recipe_for_each_registry():
    folders = [
        "online_meta/rules",
        "online_meta/learners",
        "online_meta/outcomes",
        "streams/sources",
        "trainers/comparators",
        "deploy/telemetry/metrics",
    ]
    assert [place.rsplit("/", 1)[0] for place in RECIPES] == folders


@pytest.mark.parametrize("place", RECIPES)
def test_a_recipe_is_short(place):
    assert len(RECIPES[place].splitlines()) < MOST_LINES


def test_every_recipe_is_found_by_the_contract_tests_and_passes(project):
    names = [place.rsplit("/", 1)[1].removesuffix(".py") for place in RECIPES]
    floors = [f"{floor}/testing" for floor in FLOORS]
    chosen = [*floors, "tests/house/test_code.py", "-k", " or ".join(names)]
    code, output = run(project, "pytest", "-v", "-p", "no:cacheprovider", "-p", "no:xdist", *chosen)
    assert code == 0, output
    for name, least in zip(names, (30, 20, 12, 6, 6, 3), strict=True):
        passed = [line for line in output.splitlines() if name in line and "PASSED" in line]
        assert len(passed) >= least, output


def test_the_recipes_are_formatted_and_lint_free(project):
    code, output = run(project, "ruff", "check", "--no-cache", *RECIPES)
    assert code == 0, output
    code, output = run(project, "ruff", "format", "--no-cache", "--check", *RECIPES)
    assert code == 0, output
