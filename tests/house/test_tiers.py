"""Every slow test runs in exactly one of the six parts, and the table of slow tests names only existing tests."""

import subprocess
import sys

import pytest

from tests import tiers
from tests.house.sources import ROOT

IDS = [f"tests/{folder}/test_{name}.py::test_it[{case}]" for folder in "abc" for name in range(20) for case in range(9)]


def test_a_part_depends_only_on_the_id_and_no_part_is_empty():
    found = [tiers.part_of(id) for id in IDS]
    assert found == [tiers.part_of(id) for id in IDS]
    assert {part: found.count(part) > len(IDS) / 10 for part in range(tiers.PARTS)} == dict.fromkeys(range(6), True)


def collect(*arguments):
    """Return the ids that pytest collects."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [line for line in done.stdout.splitlines() if "::" in line]
    assert len(set(found)) == len(found)
    return found


@pytest.fixture(scope="module")
def every_id():
    return collect()


def split_id(id):
    """Return the name of a test function and the id of its case."""
    function, _, case = id.split("::", 1)[1].partition("[")
    return function, case.removesuffix("]")


def test_the_parts_hold_every_slow_test_once():
    """The command line selects the parts, in a folder with tests of each part."""
    every, slow = set(collect("tests/crash")), set(collect("tests/crash", "-m", "slow"))
    parts = [set(collect("tests/crash", f"--slow-part={part}")) for part in range(tiers.PARTS)]
    assert set(collect("tests/crash", "-m", "not slow")) == every - slow
    assert all(every - slow < part for part in parts)
    assert sorted(id for part in parts for id in part & slow) == sorted(slow)


def test_each_part_of_all_slow_tests_is_about_a_sixth(every_id):
    slow = [id for id in every_id if tiers.is_slow(*split_id(id))]
    assert len(slow) > 100
    for part in range(tiers.PARTS):
        assert len(slow) / 9 < sum(tiers.part_of(id) == part for id in slow) < len(slow) / 4


def test_every_name_and_case_in_the_table_exists(every_id):
    cases = {split_id(id) for id in every_id}
    functions = {function for function, _ in cases}
    assert {*tiers.SLOW, *tiers.SLOW_PREFIXES} <= functions
    assert {(function, case) for function, kept in tiers.SLOW.items() for case in kept} <= cases
    for function, prefixes in tiers.SLOW_PREFIXES.items():
        for prefix in prefixes:
            assert any(name == function and case.startswith(prefix) for name, case in cases), prefix
        assert any(name == function and not case.startswith(prefixes) for name, case in cases), function
