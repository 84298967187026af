"""The checks of a run's health as a pure function of observed facts."""

from dataclasses import replace
from pathlib import Path

import pytest

from deploy.config.config import ServeSettings
from deploy.telemetry.facts import GIB, MIB, Facts, ProcessFacts, SourceFacts, WindowFacts
from deploy.telemetry.health import AREAS, JUDGES, Check, date_checks, judge, list_failing, worst_level
from trainers.journal.heartbeat import ARCHIVE, COMPILING, DISK, PLAYING, REPLAYING, STARTING

PAGE = Path(__file__).parents[2] / "docs/how-to/health.md"
SUSPENDED = ProcessFacts(suspended=True, silent_seconds=4, idle_seconds=2)
HUNG = ProcessFacts(phase=PLAYING, silent_seconds=12, idle_seconds=11)
ENDED = ProcessFacts(alive=False, reported=False, seconds=0.2)
RESTARTING = ProcessFacts(reported=False, seconds=6, restarts=1)
OUT_OF_SPACE = ProcessFacts(alive=False, reported=False, cause=DISK, last_words="OSError: No space left on device")
NO_ARCHIVE = ProcessFacts(alive=False, reported=False, cause=ARCHIVE, last_words="ArchiveUnreachable: s3")
QUEUE = SourceFacts("queue")
REFUSED = SourceFacts("queue", "ConnectionError: refused", seconds=6.0, answered=False)
HEALTHY = WindowFacts(rounds=100, steps=100, loss_before=200.0, loss_after=100.0)

FAULTS: dict[str, tuple[Facts, str, str]] = {
    "trainer killed": (Facts(trainer=ENDED, pending=383, stalled_seconds=0), "trainer", "fail"),
    "trainer restarting": (Facts(trainer=RESTARTING, pending=383), "trainer", "fail"),
    "trainer stopped by a signal": (Facts(trainer=SUSPENDED, pending=9, stalled_seconds=400), "trainer", "fail"),
    "trainer hangs": (Facts(trainer=HUNG, pending=9, stalled_seconds=400), "trainer", "fail"),
    "trainer does not come up": (
        Facts(trainer=ProcessFacts(reported=False, first_start=True, seconds=301)),
        "trainer",
        "fail",
    ),
    "trainer in an endless round": (
        Facts(trainer=ProcessFacts(phase=PLAYING, silent_seconds=70, longest=2.0)),
        "trainer",
        "warn",
    ),
    "trainer ends at the same round twice": (Facts(trainer=ENDED, deaths=2, pending=3), "restarts", "fail"),
    "no progress": (Facts(pending=5, stalled_seconds=31), "progress", "fail"),
    "no progress in one long round": (
        Facts(pending=5, stalled_seconds=301, trainer=ProcessFacts(phase=PLAYING, silent_seconds=59)),
        "progress",
        "fail",
    ),
    "slower than usual": (Facts(pending=5, usual_seconds=0.1, recent_seconds=0.6), "progress", "warn"),
    "disk full": (Facts(free_bytes=0, pending=3, stalled_seconds=90, trainer=OUT_OF_SPACE), "disk", "fail"),
    "quota exceeded": (Facts(trainer=OUT_OF_SPACE, comparators=OUT_OF_SPACE), "disk", "fail"),
    "commit refused": (Facts(commit_error="the disk is full"), "disk", "fail"),
    "disk nearly full": (Facts(free_bytes=GIB - 1), "disk", "warn"),
    "backlog nearly full": (Facts(pending=800), "backlog", "warn"),
    "backlog full": (Facts(pending=1000), "backlog", "warn"),
    "broker gone": (Facts(sources=(REFUSED,)), "source:queue", "fail"),
    "broker refuses for a moment": (Facts(sources=(replace(REFUSED, seconds=1.0),)), "source:queue", "warn"),
    "broker silent": (Facts(sources=(replace(QUEUE, silent_seconds=61.0),)), "source:queue", "warn"),
    "archive gone": (Facts(archive_error="ArchiveUnreachable: s3"), "archive", "warn"),
    "archive silent": (
        Facts(archive_seconds=16, maintenance=replace(HUNG, phase=STARTING)),
        "archive",
        "warn",
    ),
    "archive needed and gone": (Facts(trainer=NO_ARCHIVE, pending=4, stalled_seconds=50), "archive", "fail"),
    "diverged and rolled back": (Facts(last=replace(HEALTHY, rollbacks=1)), "divergence", "warn"),
    "diverged after rollbacks": (
        Facts(last=replace(HEALTHY, rollbacks=2, loss_after=1e9, skipped_steps=30.0)),
        "divergence",
        "fail",
    ),
    "meta-steps skipped": (Facts(last=replace(HEALTHY, skipped_steps=6.0)), "divergence", "warn"),
    "rounds skipped": (Facts(last=replace(HEALTHY, skipped=51.0, loss_before=98.0)), "divergence", "fail"),
    "quarantine": (Facts(last=replace(HEALTHY, quarantined=1.0)), "quarantine", "warn"),
    "adaptation hurts": (Facts(last=replace(HEALTHY, loss_after=201.0)), "adaptation", "warn"),
    "answers too sure": (Facts(last=replace(HEALTHY, targets=200, coverage=0.79)), "calibration", "warn"),
    "answers not sure enough": (Facts(last=replace(HEALTHY, targets=200, coverage=0.98)), "calibration", "warn"),
    "probabilities are wrong": (
        Facts(last=replace(HEALTHY, targets=200, calibration_error=0.21)),
        "calibration",
        "warn",
    ),
    "no checkpoint": (Facts(rounds=76, checkpoint_seconds=61, checkpoint_every=25), "checkpoint", "warn"),
    "maintenance dead": (Facts(maintenance=ENDED), "maintenance", "warn"),
    "rounds cannot be sealed": (Facts(maintenance=ProcessFacts(problem="cannot be sealed")), "maintenance", "warn"),
    "comparators dead": (Facts(comparators=ENDED), "comparators", "warn"),
    "comparators hang": (Facts(comparators=SUSPENDED), "comparators", "warn"),
    "comparators too slow": (Facts(rounds=5000, checkpoint_round=5000, compared=3000), "comparators", "warn"),
    "nothing published": (Facts(published=False), "answers", "fail"),
    "draining": (Facts(draining=True), "daemon", "fail"),
}


def turned(facts: Facts) -> dict[str, str]:
    """Return the levels of the checks that are not ok."""
    return {check.name: check.level for check in judge(facts) if check.level != "ok"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_turns_exactly_its_check(fault: str) -> None:
    facts, name, level = FAULTS[fault]
    assert turned(facts) == {name: level}
    check = next(check for check in judge(facts) if check.name == name)
    assert check.evidence
    assert check.what_to_do
    assert worst_level(judge(facts)) == level


@pytest.mark.parametrize(
    "facts",
    [
        Facts(),
        Facts(trainer=ProcessFacts(reported=False, first_start=True, seconds=200), published=True, pending=1),
        Facts(trainer=ProcessFacts(phase=REPLAYING, first=75, last=99), pending=40),
        Facts(trainer=ProcessFacts(phase=COMPILING), pending=40, stalled_seconds=20),
        Facts(trainer=ProcessFacts(phase=PLAYING, silent_seconds=59), pending=1, stalled_seconds=59),
        Facts(trainer=ProcessFacts(phase=PLAYING, silent_seconds=200, longest=21.0), pending=1, stalled_seconds=250),
        Facts(trainer=ProcessFacts(phase=STARTING, silent_seconds=120)),
        Facts(pending=700, usual_seconds=2.0, recent_seconds=9.9, stalled_seconds=39),
        Facts(maintenance=ProcessFacts(needed=False), comparators=ProcessFacts(needed=False)),
        Facts(free_bytes=5 * MIB, total_bytes=6 * MIB),
        Facts(sources=(QUEUE, replace(QUEUE, name="b", silent_seconds=59.0))),
        Facts(pending=500, sources=(replace(QUEUE, answered=False),)),
        Facts(last=HEALTHY),
        Facts(last=replace(HEALTHY, targets=199, coverage=0.1)),
        Facts(last=replace(HEALTHY, targets=200, coverage=0.8)),
        Facts(last=replace(HEALTHY, targets=200, calibration_error=0.2)),
        Facts(last=WindowFacts(rounds=19, skipped_steps=19, steps=19, loss_before=1.0, loss_after=2.0)),
        Facts(rounds=76, checkpoint_seconds=59),
        Facts(rounds=1000, compared=0, checkpoint_round=1000),
        Facts(deaths=1),
        Facts(last=replace(HEALTHY, charged=1.0, loss_after=1e6)),
    ],
    ids=range(21),
)
def test_idle_starting_compiling_and_replaying_with_progress_is_well(facts: Facts) -> None:
    assert turned(facts) == {}
    assert list_failing(judge(facts)) == ()
    assert all(check.what_to_do == "" for check in judge(facts))


def test_the_evidence_has_the_figures() -> None:
    def evidence(facts: Facts, name: str) -> str:
        return next(check.evidence for check in judge(facts) if check.name == name)

    replaying = ProcessFacts(phase=REPLAYING, first=75, last=1099)
    assert evidence(Facts(trainer=replaying), "trainer") == "replaying rounds 75 to 1,099"
    stalled = Facts(pending=383, stalled_seconds=200, usual_seconds=0.02)
    assert evidence(stalled, "progress") == (
        "383 tasks wait, and no round was made for 3 m 20 s; a round usually takes 0.02 s"
    )
    assert evidence(Facts(free_bytes=3 * MIB, total_bytes=5 * GIB), "disk") == "3 MiB of 5.0 GiB are free"
    facts = Facts(trainer=OUT_OF_SPACE, free_bytes=0)
    assert {check.name: check.because for check in judge(facts) if check.because} == {"trainer": "disk"}
    assert "No space left on device" in evidence(facts, "disk")
    hurts = replace(HEALTHY, loss_after=230.0)
    assert evidence(Facts(last=hurts), "adaptation") == ("mean loss 2 before adaptation and 2.3 after, last 100 rounds")


def test_two_faults_turn_two_checks() -> None:
    assert turned(Facts(trainer=SUSPENDED, free_bytes=0)) == {"trainer": "fail", "disk": "fail"}, (
        "the full disk is not why the trainer is stopped"
    )


@pytest.mark.parametrize(
    ("facts", "ready"),
    [
        (Facts(), AREAS),
        (Facts(trainer=SUSPENDED), ("ingest", "answers")),
        (Facts(published=False), ("ingest", "learning")),
        (Facts(free_bytes=0), ("answers",)),
        (Facts(sources=(REFUSED,), takes_http=True), AREAS),
        (Facts(sources=(REFUSED,), takes_http=False), ("answers", "learning")),
        (Facts(pending=1000), AREAS),
        (Facts(comparators=ENDED), AREAS),
        (Facts(draining=True), ()),
    ],
)
def test_areas_fail_on_their_own(facts: Facts, ready: tuple[str, ...]) -> None:
    assert tuple(area for area in AREAS if not list_failing(judge(facts), area)) == ready


def test_a_check_keeps_the_time_at_which_it_took_its_level() -> None:
    first = date_checks((), [Check("a", "ok", "1"), Check("b", "fail", "1")], 10.0)
    second = date_checks(first, [Check("a", "warn", "2"), Check("b", "fail", "2"), Check("c", "ok", "2")], 12.0)
    assert [(check.name, check.level, check.evidence, check.since) for check in second] == [
        ("a", "warn", "2", 12.0),
        ("b", "fail", "2", 10.0),
        ("c", "ok", "2", 12.0),
    ]


def test_levels_are_ordered() -> None:
    checks = [Check("a", "ok", ""), Check("b", "warn", ""), Check("c", "fail", "", of=("learning",))]
    assert worst_level([]) == "ok"
    assert worst_level(checks[:2]) == "warn"
    assert worst_level(checks) == "fail"
    assert list_failing(checks) == (checks[2],)
    assert list_failing(checks, "ingest") == ()


def test_the_page_lists_every_check() -> None:
    found = judge(Facts(sources=(SourceFacts("NAME"),), forks=(("NAME", ProcessFacts()),)))
    assert len(found) == len(JUDGES) + 2
    listed = [line.split("`")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert [name for name in listed if not name.startswith("/")] == [check.name for check in found]


@pytest.mark.parametrize("address", ["8781", "127.0.0.1", "127.0.0.1:", ":8781", "127.0.0.1:99999", "host:x"])
def test_an_address_of_probes_is_checked(address: str) -> None:
    with pytest.raises(ValueError, match="write it as host:port"):
        ServeSettings(probes=address)
