"""The view of a run is the same from stored sums plus later records as from all records, whatever was lost."""

import json
import math
import random

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from deploy.telemetry import run_view
from deploy.telemetry.metrics import MetricState, pool
from deploy.telemetry.pool import PoolSums
from deploy.telemetry.prometheus import make_instruments
from deploy.telemetry.run_view import LINE_LENGTH, RunView
from deploy.telemetry.series import regret_series
from online_meta.regret.ledger import MAIN_LEARNER
from online_meta.regret.running_sums import count_rows
from trainers.journal.jsonl import LineWriter
from trainers.journal.run_files import RunFiles

OTHER = "from_scratch"
LEARNERS = (MAIN_LEARNER, OTHER)
ROUNDS = 60


def line(round, chance):
    """Return a round record as a trainer writes it. Every seventh is skipped; some steps were not finite."""
    skipped = "not_finite" if round % 7 == 3 else None

    def losses():
        return {
            "loss_before": chance.random() * 3,
            "loss_after": chance.random(),
            "accuracy": chance.choice([None, 0.5]),
        }

    played = {} if skipped else {name: losses() for name in LEARNERS}
    nothing = {"loss_before": None, "loss_after": None, "accuracy": None}
    return {
        "round": round,
        "id": f"t{round}" * chance.randint(1, 4),
        "source": "s",
        **played.get(MAIN_LEARNER, nothing),
        "replayed": 3,
        "seconds": 0.01,
        "skipped": skipped,
        "learners": played,
        "steps": [{"norm": 1.0, "skipped": chance.choice([None, "not_finite"])}] * (round % 3),
    }


@pytest.fixture
def lines():
    chance = random.Random(5)
    return [line(round, chance) for round in range(ROUNDS)]


@pytest.fixture
def files(tmp_path):
    return RunFiles(tmp_path)


@pytest.fixture(autouse=True)
def _small_write_buffer(monkeypatch):
    monkeypatch.setattr(run_view, "MAX_UNWRITTEN_ROWS", 8)


def write(files, lines):
    writer = LineWriter(files.rounds)
    for one in lines:
        writer.append(one)
    writer.close()


def snapshot(view):
    """Return everything that a view shows."""
    return {
        "series": regret_series(view, 0, None, 7),
        "some": regret_series(view, 5, 23, 100),
        "learners": view.learners(),
        "skipped": view.skipped,
        "last": view.last,
        "rounds": [view.round(round) for round in range(view.learned() + 1)],
    }


def follow(files, close=False):
    view = RunView(files, LEARNERS)
    fresh = []
    view.refresh(fresh.append)
    if close:
        view.close()
    return view, fresh


def test_the_view_agrees_with_the_records(files, lines):
    write(files, lines)
    view, fresh = follow(files)
    assert fresh == lines
    played = [one for one in lines if not one["skipped"]]
    assert view.learned() == ROUNDS
    assert view.skipped == ROUNDS - len(played)
    assert view.last == lines[-1]
    assert [view.round(round) for round in range(ROUNDS + 1)] == [*lines, None]
    right = math.fsum(one["learners"][OTHER]["loss_after"] for one in played)
    assert view.learners()[OTHER]["cumulative_loss"] == pytest.approx(right, rel=1e-15)
    series = regret_series(view, 10, 40, 3)
    assert series["rounds"] == [19, 29, 39]
    for at, stretch in enumerate((lines[10:20], lines[20:30], lines[30:40])):
        known = [one["learners"][MAIN_LEARNER] for one in stretch if not one["skipped"]]
        assert series["loss_before"][at] == pytest.approx(sum(one["loss_before"] for one in known) / len(known))
        assert series["loss_after"][at] == pytest.approx(sum(one["loss_after"] for one in known) / len(known))
        assert series["learners"][MAIN_LEARNER]["loss"][at] == pytest.approx(
            sum(one["loss_after"] for one in known) / len(known)
        )
        assert series["learners"][MAIN_LEARNER]["rounds"][at] == len(known)
        assert series["skipped_rounds"][at] == 10 - len(known)
        right = [one["accuracy"] for one in known if one["accuracy"] is not None]
        assert series["accuracy"][at] == pytest.approx(sum(right) / len(right))


def test_a_run_without_rounds_has_an_empty_view(files):
    view, fresh = follow(files, close=True)
    assert (fresh, view.learned(), view.last, view.round(0)) == ([], 0, None, None)
    assert regret_series(view, 0, None, 10)["rounds"] == []
    assert view.learners()[MAIN_LEARNER] == {
        "cumulative_loss": 0.0,
        "rounds": 0,
        "charged_rounds": 0,
        "mean_loss_last_100": None,
        "rounds_last_100": 0,
        "charged_rounds_last_100": 0,
        "mean_accuracy_last_100": None,
        "accuracy_rounds_last_100": 0,
        "without_leaks": {"cumulative_loss": 0.0, "rounds": 0, "mean_loss_last_100": None, "rounds_last_100": 0},
    }


@pytest.mark.parametrize("seen", [1, 7, 8, 31, ROUNDS])
@pytest.mark.parametrize("closed", [True, False], ids=["closed", "killed"])
def test_the_next_view_reads_only_new_records(files, lines, seen, closed):
    write(files, lines[:seen])
    follow(files, closed)
    write(files, lines[seen:])
    view, fresh = follow(files)
    written = seen if closed else seen - seen % 8
    assert fresh == lines[written:]
    assert view.learned() == ROUNDS


@pytest.mark.parametrize("seen", [8, 31, ROUNDS])
def test_sums_plus_later_records_equal_all_records(files, lines, seen, tmp_path_factory):
    write(files, lines[:seen])
    follow(files, close=True)
    write(files, lines[seen:])
    view, _ = follow(files)
    fresh = RunFiles(tmp_path_factory.mktemp("fresh"))
    write(fresh, lines)
    assert snapshot(view) == snapshot(follow(fresh)[0])


def test_records_of_another_run_and_missing_records_are_noticed(files, lines):
    write(files, lines)
    follow(files, close=True)
    chance = random.Random(6)
    others = [line(round, chance) for round in range(ROUNDS)]
    for now in (lines[:40], others, []):
        files.rounds.write_bytes(b"")
        write(files, now)
        view, fresh = follow(files)
        assert fresh == now
        assert view.learned() == len(now)
        assert view.total(LINE_LENGTH) == files.rounds.stat().st_size


def test_a_changed_set_of_learners_discards_the_sums(files, lines):
    write(files, lines)
    follow(files, close=True)
    view = RunView(files, (MAIN_LEARNER,))
    for one in lines:
        one["learners"].pop(OTHER, None)
    files.rounds.write_bytes(b"")
    write(files, lines)
    view.refresh()
    assert list(view.learners()) == [MAIN_LEARNER]


def test_a_full_disk_costs_only_memory(files, lines, monkeypatch, caplog):
    write(files, lines)

    def refuse(*_):
        raise OSError(28, "no space left on device")

    with monkeypatch.context() as full:
        full.setattr(run_view.os, "fsync", refuse)
        view, fresh = follow(files, close=True)
    assert fresh == lines
    assert "no space left" in caplog.text
    assert view.learners()[MAIN_LEARNER] == follow(files)[0].learners()[MAIN_LEARNER]
    view.close()
    assert len(RunView(files, LEARNERS).sums) == ROUNDS


def test_the_header_of_the_sums_is_plain_json(files, lines):
    write(files, lines)
    follow(files, close=True)
    note = json.loads((files.folder / "rounds.sums.json").read_bytes())
    assert (note["version"], note["rounds"]) == (2, ROUNDS)
    assert files.sums.stat().st_size == 8 * count_rows(ROUNDS) * len(note["columns"])


def plain(round, losses, **more):
    """Return a record with these losses after adaptation."""
    learners = {name: {"loss_before": 2.0, "loss_after": loss, "accuracy": None} for name, loss in losses.items()}
    nothing = {"loss_before": None, "loss_after": None, "accuracy": None}
    own = learners.get(MAIN_LEARNER, nothing)
    record = {"round": round, "id": f"t{round}", "source": "s", **own, "replayed": 0, "seconds": 0.1, "skipped": None}
    return {**record, "learners": learners, "steps": [], **more}


def test_skipped_and_quarantined_rounds_enter_no_mean(files):
    losses = {MAIN_LEARNER: 0.5, OTHER: 1.0}
    lines = [plain(round, losses) for round in range(4)]
    lines += [plain(4, {}, skipped="quarantined"), plain(5, {}, skipped="not_finite"), plain(6, losses)]
    write(files, lines)
    view, _ = follow(files)
    found = view.learners()[MAIN_LEARNER]
    assert (found["mean_loss_last_100"], found["rounds_last_100"], found["rounds"]) == (0.5, 5, 5)
    assert (view.learned(), view.skipped, view.quarantined) == (7, 1, 1)
    regret = view.regret()[OTHER]
    assert (regret["value"], regret["rounds"], regret["as_of_round"]) == (-2.5, 5, 7)
    series = regret_series(view, 0, None, 7)
    assert series["learners"][OTHER]["loss"] == [1.0] * 4 + [None, None, 1.0]
    assert series["learners"][OTHER]["regret"] == [-0.5, -1.0, -1.5, -2.0, -2.0, -2.0, -2.5]


def test_a_learner_whose_loss_is_not_finite_is_charged_and_the_others_count(files):
    lines = [plain(round, {MAIN_LEARNER: 0.5, OTHER: 1.0}) for round in range(3)]
    lines.append(plain(3, {MAIN_LEARNER: 0.5, OTHER: None}))
    lines[3]["learners"][OTHER]["charged"] = 40.0
    lines.append(plain(4, {MAIN_LEARNER: None, OTHER: 1.0}))
    lines[4]["learners"][MAIN_LEARNER] |= {"charged": 40.0, "loss_before": None}
    write(files, lines)
    view, _ = follow(files)
    own, other = (view.learners()[name] for name in LEARNERS)
    assert (own["cumulative_loss"], own["rounds"], own["charged_rounds"]) == (42.0, 5, 1)
    assert (other["cumulative_loss"], other["rounds"], other["charged_rounds_last_100"]) == (44.0, 5, 1)
    assert view.regret()[OTHER]["value"] == -2.0
    assert regret_series(view, 0, None, 1)["loss_before"] == [(4 * 2.0 + 40.0) / 5]


def test_one_round_with_a_huge_loss_disturbs_no_later_figure(files):
    lines = [plain(round, {MAIN_LEARNER: 0.227, OTHER: 0.5}) for round in range(250)]
    lines[90] = plain(90, {MAIN_LEARNER: 1e38, OTHER: 2e38})
    write(files, lines)
    view, _ = follow(files)
    assert view.learners()[MAIN_LEARNER]["mean_loss_last_100"] == pytest.approx(0.227, rel=1e-14)
    series = regret_series(view, 0, None, 250)
    assert series["loss_after"][91:] == [0.227] * 159
    assert regret_series(view, 91, None, 3)["loss_after"] == pytest.approx([0.227] * 3, rel=1e-14)


def test_repeated_contents_and_shared_samples_are_counted_and_figures_without_them_given(files):
    contents = ["a" * 32, "b" * 32, "a" * 32, "c" * 32, "b" * 32, "d" * 32]
    lines = [
        plain(round, {MAIN_LEARNER: 1.0 + round, OTHER: 2.0}, content=content, overlap=int(round in (3, 4)))
        for round, content in enumerate(contents)
    ]
    write(files, lines)
    for seen in (follow(files, close=True)[0], follow(files)[0]):
        assert seen.leaks() == {"duplicates": 2, "overlaps": 2, "rounds": 3}
        found = seen.learners()[MAIN_LEARNER]
        assert found["mean_loss_last_100"] == pytest.approx(3.5)
        assert found["without_leaks"] == {
            "cumulative_loss": 9.0,
            "rounds": 3,
            "mean_loss_last_100": 3.0,
            "rounds_last_100": 3,
        }
        assert seen.regret()[OTHER]["value"] == 9.0
        assert seen.regret()[OTHER]["without_leaks"]["value"] == 3.0


@pytest.mark.parametrize("seen", [8, 31, ROUNDS])
def test_a_content_from_before_a_restart_is_recognised(files, lines, seen):
    lines = [{**line, "content": f"{at % 20 + 1:013x}{0:019x}", "overlap": 0} for at, line in enumerate(lines)]
    write(files, lines[:seen])
    follow(files, close=True)
    write(files, lines[seen:])
    assert follow(files)[0].leaks()["duplicates"] == 40


MIXED = ("ftml", "ftml@10", "constant", "pool")
WITH_POOL = PoolSums(MIXED, "pool", {"ftml": True, "constant": False})


def mixed_line(round, chance):
    """Return the record of a round with a pool over "ftml", "ftml@10" and "constant", which loses most."""
    hard = chance.random()
    losses = {name: hard + gap + 0.1 * chance.random() for name, gap in zip(MIXED, (0.2, 0.0, 0.5, 0.01), strict=True)}
    if round == 20:
        return plain(round, {}, skipped="quarantined")
    first = 0.1 + 0.2 * chance.random()
    weights = {"ftml": first, "ftml@10": 0.9 - first, "constant": 0.1}
    pool = {
        "aggregation": "bayes",
        "weights": weights,
        "regret": 0.01 * round,
        "bound": 3.0,
        "unclipped_regret": 0.02 * round,
    }
    spent = {"ftml": 0.25 + chance.random(), "constant": 0.0004, "pool": 0.001}
    return plain(round, losses, pool=pool, seconds_by_learner=spent)


@pytest.fixture
def mixed(files):
    chance = random.Random(3)
    lines = [mixed_line(round, chance) for round in range(150)]
    write(files, lines)
    return lines


def view_of(files, lines, sums=WITH_POOL):
    view = RunView(files, MIXED, pool=sums)
    view.refresh()
    return view


def expect_interval(values, alpha):
    """Return the mean and half the interval of some differences, by the formula written out once more."""
    rounds, deviation = len(values), np.std(values, ddof=1)
    rate = (-2 * math.log(alpha) + math.log(1 - 2 * math.log(alpha))) / 500
    inner = rounds * rate + 1
    return np.mean(values), deviation * math.sqrt(2 * inner / (rounds**2 * rate) * math.log(math.sqrt(inner) / alpha))


def test_the_verdict_agrees_with_the_records(files, mixed):
    verdict = view_of(files, mixed).verdict()
    played = [one for one in mixed if not one["skipped"]]
    losses = {name: np.array([one["learners"][name]["loss_after"] for one in played]) for name in MIXED}
    gain, width = expect_interval(losses["constant"] - losses["pool"], 0.05)
    assert (verdict["state"], verdict["reference"], verdict["best_without"]) == ("pays", "pool", "constant")
    assert (verdict["rounds"], verdict["gain"]) == (149, pytest.approx(gain, rel=1e-9))
    assert verdict["interval"] == pytest.approx((gain - width, gain + width), rel=1e-9)
    recent = played[-100:]
    weights = {name: np.mean([one["pool"]["weights"][name] for one in recent]) for name in MIXED[:-1]}
    assert verdict["weights"] == pytest.approx(weights, rel=1e-12)
    seconds = {
        name: np.mean([one["seconds_by_learner"][name] for one in recent]) for name in ("ftml", "constant", "pool")
    }
    assert verdict["seconds_per_round"] == pytest.approx(seconds, rel=1e-12)
    assert verdict["sentence"] == (
        "Meta-learning pays here: the pool is ahead of the best that does not learn across tasks (constant) by "
        f"{gain:.3f} +- {width:.3f} a task; {100 * weights['ftml@10']:.0f} % of its weight is on FTML with 10 steps."
    )
    assert json.loads(json.dumps(verdict))["can_be_switched_off"] == []


def test_the_verdict_of_the_leader_where_there_is_no_pool(files, mixed):
    verdict = view_of(files, mixed, PoolSums(MIXED, None, {"constant": False, "pool": True})).verdict()
    played = [one["learners"] for one in mixed if not one["skipped"]]
    gain, width = expect_interval([one["constant"]["loss_after"] - one["ftml"]["loss_after"] for one in played], 0.05)
    assert (verdict["state"], verdict["reference"], verdict["weights"]) == ("pays", "ftml", {})
    assert (verdict["gain"], verdict["interval"][0]) == (pytest.approx(gain), pytest.approx(gain - width))
    assert verdict["sentence"].startswith("Meta-learning pays here: FTML is ahead of the best")


def test_sums_of_an_earlier_version_are_made_again_with_the_pool(files, mixed):
    RunView(files, MIXED).refresh()
    before = RunView(files, MIXED)
    before.refresh()
    before.close()
    assert view_of(files, mixed).verdict() == view_of(files, mixed).verdict()
    view = view_of(files, mixed)
    view.close()
    again = view_of(files, mixed)
    assert again.verdict() == view.verdict()
    assert again.verdict()["state"] == "pays"


def test_records_without_durations_have_no_costs(files):
    write(files, [plain(round, {MAIN_LEARNER: 0.5, OTHER: 1.0}) for round in range(60)])
    verdict = RunView(files, LEARNERS, pool=PoolSums(LEARNERS, None, {OTHER: False}))
    verdict.refresh()
    found = verdict.verdict()
    assert (found["state"], found["seconds_per_round"], found["interval"]) == ("pays", {}, (0.5, 0.5))


def test_the_series_has_the_pools_weights_and_its_regret_at_the_end_of_each_bucket(files, mixed):
    view = view_of(files, mixed)
    found = regret_series(view, 0, None, 15)["pool"]
    assert found["name"] == "pool"
    for at in range(15):
        stretch = [one for one in mixed[10 * at : 10 * at + 10] if not one["skipped"]]
        right = np.mean([one["pool"]["weights"]["ftml"] for one in stretch])
        assert found["weights"]["ftml"][at] == pytest.approx(right, rel=1e-12)
    assert found["regret"] == [pytest.approx(0.01 * (10 * at + 9)) for at in range(15)]
    assert found["unclipped_regret"] == [pytest.approx(0.02 * (10 * at + 9)) for at in range(15)]
    assert found["bound"] == [3.0] * 15
    single = regret_series(view, 19, 22, 3)["pool"]
    assert (single["regret"], single["bound"]) == ([0.19, None, 0.21], [3.0, None, 3.0])
    assert single["weights"]["constant"] == [0.1, None, 0.1]
    assert "pool" not in regret_series(RunView(files, MIXED), 0, None, 15)


def test_the_metrics_of_the_pool_are_those_of_the_last_record(files, mixed):
    registry = CollectorRegistry()
    instruments, view = make_instruments(registry), view_of(files, mixed)
    pool.update(instruments, MetricState(view, 0, lambda: None, 0, 1))
    found = registry.get_sample_value
    last = mixed[-1]["pool"]
    assert found("online_meta_pool_regret") == last["regret"]
    assert found("online_meta_pool_regret_bound") == last["bound"]
    assert found("online_meta_pool_unclipped_regret") == last["unclipped_regret"]
    for expert, weight in last["weights"].items():
        assert found("online_meta_pool_weight", {"expert": expert}) == weight
    verdict = view.verdict()
    assert found("online_meta_verdict_gain") == verdict["gain"]
    assert found("online_meta_verdict", {"state": "pays"}) == 1
    assert found("online_meta_verdict", {"state": "too_early"}) == 0
    for learner, seconds in verdict["seconds_per_round"].items():
        assert found("online_meta_learner_round_seconds", {"learner": learner}) == seconds
    write(files, [plain(150, {}, skipped="quarantined")])
    view.refresh()
    pool.update(instruments, MetricState(view, 0, lambda: None, 0, 1))
    assert found("online_meta_pool_regret") == last["regret"], "a round without figures changes none"
