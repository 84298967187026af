"""Every slow test runs in exactly one of the three thirds, and the table of slow tests names only existing tests."""

import subprocess
import sys

import pytest

from tests import tiers
from tests.house.sources import ROOT

IDS = [f"tests/{folder}/test_{name}.py::test_it[{case}]" for folder in "abc" for name in range(20) for case in range(9)]


def test_a_third_depends_only_on_the_id_and_no_third_is_empty():
    found = [tiers.third_of(id) for id in IDS]
    assert found == [tiers.third_of(id) for id in IDS]
    assert {third: found.count(third) > len(IDS) / 5 for third in range(tiers.THIRDS)} == dict.fromkeys(range(3), True)


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


def test_the_thirds_hold_every_slow_test_once():
    """The command line selects the thirds, in a folder with tests of each third."""
    every, slow = set(collect("tests/crash")), set(collect("tests/crash", "-m", "slow"))
    parts = [set(collect("tests/crash", f"--slow-third={third}")) for third in range(tiers.THIRDS)]
    assert set(collect("tests/crash", "-m", "not slow")) == every - slow
    assert all(every - slow < part for part in parts)
    assert sorted(id for part in parts for id in part & slow) == sorted(slow)


def test_each_third_of_all_slow_tests_is_about_a_third(every_id):
    slow = [id for id in every_id if tiers.is_slow(*split_id(id))]
    assert len(slow) > 100
    for third in range(tiers.THIRDS):
        assert len(slow) / 5 < sum(tiers.third_of(id) == third for id in slow) < len(slow) / 2


def test_every_name_and_case_in_the_table_exists(every_id):
    cases = {split_id(id) for id in every_id}
    functions = {function for function, _ in cases}
    assert {*tiers.SLOW, *tiers.SLOW_PREFIXES} <= functions
    assert {(function, case) for function, kept in tiers.SLOW.items() for case in kept} <= cases
    for function, prefixes in tiers.SLOW_PREFIXES.items():
        for prefix in prefixes:
            assert any(name == function and case.startswith(prefix) for name, case in cases), prefix
        assert any(name == function and not case.startswith(prefixes) for name, case in cases), function
