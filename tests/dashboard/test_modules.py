"""The page's pure functions, called in a browser."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from deploy.reports.report import MUTED, assign_colours, choose_shown, order_comparators
from tests.dashboard.conftest import Visit
from tests.support.dashboard_stand_in import DASHBOARD, MANY, Daemon

CALL = """([module, name, args]) => import(`/static/${module}.js`).then((found) => found[name](...args))"""


@pytest.fixture
def call(visit: Callable[..., Visit]) -> Callable[..., Any]:
    page = visit(Daemon()).page

    def run(module: str, name: str, *args: Any) -> Any:
        return page.evaluate(CALL, [module, name, list(args)])

    run.page = page  # type: ignore[attr-defined]
    return run


# Here " ", "-" and "?" stand for narrow spaces, minus signs, and the dash for an unknown value.
FORMATS = [
    ("formatCompact", 1234, "1.23 k"),
    ("formatCompact", 999_999, "1 M"),
    ("formatCompact", -250, "-250"),
    ("formatCount", 9876, "9,876"),
    ("formatCount", 12_345, "12.3 k"),
    ("formatCount", None, "?"),
    ("formatReal", 0.4213, "0.421"),
    ("formatReal", 301.24, "301.2"),
    ("formatReal", 1295.84, "1,295.8"),
    ("formatReal", 0.00012, "1.2e-4"),
    ("formatReal", 0, "0"),
    ("formatReal", None, "?"),
    ("formatSigned", 42.14, "+42.1"),
    ("formatSigned", -81, "-81.0"),
    ("formatPercent", 0.8634, "86.3 %"),
    ("formatDuration", 0.41, "0.41 s"),
    ("formatDuration", 3.14, "3.1 s"),
    ("formatDuration", 59.7, "1 m"),
    ("formatDuration", 200, "3 m 20 s"),
    ("formatDuration", 11_520, "3 h 12 m"),
    ("formatDuration", 220_000, "2 d 13 h"),
    ("formatAgo", 0.4, "just now"),
    ("formatAgo", 200, "3 m 20 s ago"),
    ("formatRate", 2.4, "2.4/s"),
    ("formatRate", 0, "0/s"),
    ("formatRate", 0.05, "3/min"),
    ("formatRate", 120, "120/s"),
    ("formatName", "train_on_everything", "train on everything"),
    ("formatName", "ftml", "FTML"),
    ("formatName", "ftml@10", "FTML with 10 steps"),
    ("formatName", "ftml@meta_sgd10", "FTML with 10 steps of meta sgd"),
    ("formatName", "ftml@ridge_head", "FTML with a ridge head"),
    ("formatName", "online_reptile@1", "online reptile with 1 step"),
]


def test_numbers_and_times(call: Callable[..., Any]) -> None:
    plain = str.maketrans({"\u202f": " ", "\u2212": "-", "\u2013": "?"})
    found = [(name, value, call("format", name, value).translate(plain)) for name, value, _ in FORMATS]
    assert found == FORMATS


def test_series(call: Callable[..., Any]) -> None:
    assert call("series", "trailingMean", [1, 2, None, 4], 1) == [1, 2, None, 4]
    assert call("series", "trailingMean", [6, 0, 3, None, 3], 2) == [None, 3, 1.5, None, 3]
    assert call("series", "trailingMean", [6, 0, None, None, 3], 2, True) == [None, 3, 0, None, 3]
    assert call("series", "findLonely", [1, None, 2, 3, None, 4]) == [0, 5]
    assert call("series", "relativeChange", [2.0] * 50 + [1.0] * 50) == -0.5
    assert call("series", "relativeChange", [1.0] * 5) is None
    assert call("series", "orderLearners", "ftml", {"b": 1, "ftml": 1}, {"a": 1}) == ["ftml", "b", "a"]
    regret = {"x": {"kind": "baseline"}, "dynamic": {"kind": "dynamic"}}
    assert call("series", "comparatorKinds", regret, [{"kind": "hindsight"}]) == ["hindsight", "dynamic"]


def test_a_trailing_mean_recovers_after_a_huge_value(call: Callable[..., Any]) -> None:
    found = call("series", "trailingMean", [0.227, 1e20, *[0.227] * 9], 3)
    assert found[4:] == pytest.approx([0.227] * 7)


BASELINE = {"kind": "baseline", "value": -81.0, "rounds": 305, "as_of_round": 305, "standard_error": 5.0}
ESTIMATE = {"kind": "hindsight", "value": 4.0, "standard_error": 0.0, "as_of_round": 300, "exact": False}
REGRETS = [
    (
        {**BASELINE, "verdict": "ahead", "interval": [-120, -40]},
        "FTML is ahead by 81.0 over 305 rounds; 95 % interval",
        "good",
    ),
    ({**BASELINE, "verdict": "behind", "interval": [1, 4]}, "FTML is behind by 81.0", "warn"),
    ({**BASELINE, "verdict": "level", "interval": [-1, 1]}, "FTML is level with it", ""),
    (
        {**BASELINE, "verdict": "too early", "interval": [-200, 9]},
        "too early to say over 305 rounds; 95 % interval",
        "",
    ),
    (
        {**BASELINE, "verdict": "too early", "interval": None},
        "too early to say over 305 rounds; standard error 5.00",
        "",
    ),
    ({**BASELINE}, "too early to say", ""),
    ({**ESTIMATE, "lower_bound": True}, "estimate, a lower bound, as of round 300", ""),
    ({**ESTIMATE, "lower_bound": False, "standard_error": 2.5}, "estimate (standard error 2.50), as of", ""),
    ({**ESTIMATE, "lower_bound": True, "settled": False}, "estimate, a lower bound, not settled, as of", ""),
    ({**ESTIMATE, "lower_bound": False, "first_round": 40}, "estimate, from round 41 on, as of round 300", ""),
    ({**ESTIMATE, "kind": "another", "exact": True}, "exact, as of round 300", ""),
]


@pytest.mark.parametrize(("entry", "words", "level"), REGRETS)
def test_regret_in_words_and_its_colour(
    call: Callable[..., Any], entry: dict[str, Any], words: str, level: str
) -> None:
    found = call("wording", "explainRegret", "ftml", entry).translate({0x202F: " "})
    assert found.startswith(words)
    assert call("wording", "judgeVerdict", entry) == level


def test_a_mean_names_its_rounds(call: Callable[..., Any]) -> None:
    assert call("wording", "describeMean", 100) == "mean of the last 100"
    assert call("wording", "describeMean", 7, 2) == "mean of 7 rounds, 2 not finite"
    assert call("wording", "describeLosses", {"loss_before": None, "loss_after": 0.5}) == "not finite → 0.500"


def test_learners_and_comparators_have_the_same_colour_on_the_page_and_in_the_report(call: Callable[..., Any]) -> None:
    names = ["ftml", *(f"baseline_{at}" for at in range(9))]
    kinds = ["hindsight", "closed_form", "dynamic", "other"]
    sheet = (DASHBOARD / "colors.css").read_text()
    light = dict(re.findall(r"--ink-(\w+): light-dark\((#[0-9a-f]{6})", sheet))
    script = """([names, kinds]) => import("/static/palette.js").then(({ assignLooks }) =>
        Object.fromEntries([...assignLooks(names, kinds)].map(([name, look]) => [name, String(look.color)])))"""
    found = call.page.evaluate(script, [names, kinds])  # type: ignore[attr-defined]
    assert {name: light[ink] for name, ink in found.items()} == assign_colours(names, kinds)
    assert light["muted"] == MUTED
    assert order_comparators(["dynamic", "hindsight", "closed_form", "hindsight"]) == [
        "hindsight",
        "closed_form",
        "dynamic",
    ]


POOL = {"reference": "pool", "best_without": "pooled_ridge"}
CASES = [
    ((), None),
    (MANY, None),
    (MANY, {**POOL, "weights": {}}),
    (MANY, {**POOL, "weights": {"ftml@10": 0.9, "ftml@5": 0.08, "aruba": 0.009}}),
    (MANY, {"reference": "ftml", "best_without": None, "weights": {}}),
    ((*MANY[:6], "pool"), {**POOL, "weights": {}}),
]


@pytest.mark.parametrize(("learners", "verdict"), CASES)
def test_the_page_and_the_commands_show_the_same_answers(
    call: Callable[..., Any], verdict: dict[str, Any] | None, learners: tuple[str, ...]
) -> None:
    script = """([names, verdict]) => import("/static/pool.js").then(({ findMinor, putPoolSecond }) => {
        const status = { leader: names[0], verdict };
        return [[...findMinor(names, status)], putPoolSecond(names, status)];
    })"""
    minor, order = call.page.evaluate(script, [learners, verdict])  # type: ignore[attr-defined]
    shown = choose_shown({name: name for name in learners}, verdict or {})
    assert set(shown) == set(learners) - set(minor)
    assert [*shown][:1] == (order[1:2] if verdict and verdict["reference"] == "pool" else order[:1])
    assert not learners or len(shown) <= 8


def test_learning_efficiency_in_words(call: Callable[..., Any]) -> None:
    assert call("wording", "nameProficiency", 0.9, True) == "90\u202f% accuracy"
    assert call("wording", "nameProficiency", 0.05, False) == "a loss of 0.05"
    efficiency = {"reached": 0.82, "mean_points_needed": 3.2}
    assert call("wording", "describePoints", efficiency) == "3.20 (reached in 82.0\u202f%)"
    assert call("wording", "describePoints", {"reached": 0, "mean_points_needed": None}) == "never reached"
    assert call("wording", "describePoints", {"reached": None, "mean_points_needed": None}) == "\u2013"
    assert call("wording", "describePoints") == "\u2013"


def test_the_columns_of_the_table(call: Callable[..., Any]) -> None:
    regression = {"ftml": {"learning_efficiency_last_100": {"prefixes": [], "proficiency": 0.5}}}
    found = call("table", "chooseColumns", regression, ["ftml"])
    assert found == {"accuracy": False, "points": "Points to a loss of 0.5, last 100", "weight": False, "cost": False}
    nothing = {"accuracy": False, "points": None, "weight": False, "cost": False}
    classes = {"ftml": {"mean_accuracy_last_100": 0.5, "learning_efficiency_last_100": {"prefixes": []}}}
    assert call("table", "chooseColumns", classes, ["ftml"]) == {**nothing, "accuracy": True}
    assert call("table", "chooseColumns", {}, []) == nothing
    verdict = {"weights": {"ftml": 1.0}, "seconds_per_round": {"ftml": 0.1}}
    assert call("table", "chooseColumns", {}, [], verdict) == {**nothing, "weight": True, "cost": True}


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "Keeping up"),
        ({"pending": 0}, "Up to date"),
        ({"pending": 1000}, "Backlog full"),
        ({"oldest_pending_age_seconds": 40.0}, "Falling behind"),
        ({"pending": 90, "learned_per_second": 9.0}, "Catching up"),
    ],
)
def test_pace(call: Callable[..., Any], changes: dict[str, Any], verdict: str) -> None:
    status = Daemon(rounds=60).status()
    status["rounds"] |= changes
    assert call("wording", "describePace", status)["verdict"] == verdict
