"""The health of a run: a list of checks, computed from observed facts by pure functions.

Every face reads this list: ``/v1/health``, ``/readyz``, the page, ``online-meta status``, the metrics. A fault turns
the check that names its cause; a check whose facts follow from that cause stays ok and says so.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from deploy.telemetry.facts import GIB, MIB, Facts, ProcessFacts, SourceFacts
from trainers.journal.heartbeat import ARCHIVE, DISK, ENDED, REPLAYING, STARTING

Level = Literal["ok", "warn", "fail"]
LEVELS: tuple[Level, ...] = ("ok", "warn", "fail")

INGEST, ANSWERS, LEARNING = "ingest", "answers", "learning"
AREAS = (INGEST, ANSWERS, LEARNING)
"""What a daemon does: it takes tasks in, it answers, it learns."""

SUSPENDED_SECONDS = 3.0
SILENT_SECONDS = 10.0
"""A process that is silent, and uses no processor time, for this long does not work."""
LONG_ROUND_SECONDS = 60.0
START_SECONDS = 300.0
STALLED_SECONDS = 30.0
LONGEST_STALL_SECONDS = 300.0
SOURCE_SECONDS = 5.0
SOURCE_SILENT_SECONDS = 60.0
ARCHIVE_SECONDS = 15.0
CHECKPOINT_SECONDS = 60.0
FEWEST_ROUNDS = 20
"""Shares of skipped rounds and the effect of adaptation are judged from this many rounds on."""
FEWEST_TARGETS = 200
"""Calibration is judged from this many predicted targets on."""
LEAST_COVERAGE, MOST_COVERAGE, MOST_CALIBRATION_ERROR = 0.80, 0.97, 0.20
"""Within these bounds, intervals of 90 % and probabilities of classes count as right."""


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: of the check.
        level: "ok", "warn" (it needs attention) or "fail" (something does not work).
        evidence: a sentence with the figures behind the level.
        what_to_do: advice; "" if the level is ok.
        of: the areas that do not work if the check fails.
        since: Unix time at which the check took this level.
        because: the name of the check whose trouble explains this one's facts, so that this one stays ok; "" for none.
    """

    name: str
    level: Level
    evidence: str
    what_to_do: str = ""
    of: tuple[str, ...] = ()
    since: float = 0.0
    because: str = ""


def judge(facts: Facts) -> tuple[Check, ...]:
    """Return all checks, each at its level; ``since`` is not set yet."""
    found = [*(one(facts) for one in JUDGES), *(_judge_source(facts, source) for source in facts.sources)]
    found += [_judge_process(f"fork:{name}", process, "warn") for name, process in facts.forks]
    return _name_causes(facts, found)


def date_checks(before: Iterable[Check], found: Iterable[Check], now: float) -> tuple[Check, ...]:
    """Return the checks ``found`` with the time at which each took its level: that of ``before`` if it had it."""
    known = {(check.name, check.level): check.since for check in before}
    return tuple(replace(check, since=known.get((check.name, check.level), now)) for check in found)


def worst_level(checks: Iterable[Check]) -> Level:
    """Return the worst level of the checks; "ok" without a check."""
    return max((check.level for check in checks), key=LEVELS.index, default="ok")


def list_failing(checks: Iterable[Check], area: str | None = None) -> tuple[Check, ...]:
    """Return the checks that fail; with ``area``, those by whose failure it does not work."""
    return tuple(check for check in checks if check.level == "fail" and (area is None or area in check.of))


def _name_causes(facts: Facts, checks: Iterable[Check]) -> tuple[Check, ...]:
    """Return the checks, with those at ok whose facts follow from what another check names."""
    found = {check.name: check for check in checks}
    effects = {
        "trainer": (*_own_cause(facts.trainer), "restarts"),
        "comparators": _own_cause(facts.comparators),
        "maintenance": (*_own_cause(facts.maintenance), DISK, ARCHIVE),
        "progress": (DISK, ARCHIVE, "restarts", "trainer"),
        "checkpoint": (DISK, "restarts", "trainer"),
        "adaptation": ("divergence",),
    }
    return tuple(
        next(
            (
                replace(check, level="ok", what_to_do="", because=cause)
                for cause in effects.get(name, ())
                if check.level != "ok" and found[cause].level != "ok"
            ),
            check,
        )
        for name, check in found.items()
    )


def _own_cause(process: ProcessFacts) -> tuple[str, ...]:
    return () if process.cause is None else (process.cause,)


def _judge_daemon(facts: Facts) -> Check:
    if facts.draining:
        return Check("daemon", "fail", "the daemon is draining", "Wait for its end, or start it again.", AREAS)
    return Check("daemon", "ok", "it runs", of=AREAS)


def _judge_trainer(facts: Facts) -> Check:
    return _judge_process("trainer", facts.trainer, "fail", (LEARNING,))


def _judge_comparators(facts: Facts) -> Check:
    """Judge the process of the comparators, and the age of what they know."""
    check = _judge_process("comparators", facts.comparators, "warn")
    behind = facts.rounds - (facts.compared or 0)
    if check.level == "ok" and facts.compared is not None and behind > 10 * facts.compared_every:
        evidence = f"the oldest comparison is {behind:,} rounds behind, and one is due every {facts.compared_every:,}"
        advice = "The comparators are too slow: set regret.comparator_budget, such as 1, or lower the one that is set."
        return Check("comparators", "warn", evidence, advice)
    return check


def _judge_maintenance(facts: Facts) -> Check:
    check = _judge_process("maintenance", facts.maintenance, "warn")
    if check.level == "ok" and facts.maintenance.problem and facts.maintenance.needed:
        return Check("maintenance", "warn", facts.maintenance.problem, "No task is lost. See the log of `upkeep`.")
    return check


def _judge_process(name: str, process: ProcessFacts, worst: Level, of: tuple[str, ...] = ()) -> Check:
    """Judge whether a process runs and reports; ``worst`` is the level of one that does not."""

    def bad(evidence: str, advice: str, level: Level = worst) -> Check:
        return Check(name, level, evidence, advice, of)

    words = f" ({process.last_words})" if process.last_words else ""
    restarting = "The daemon restarts it. If that does not help, read its last lines in the log."
    hung = "The daemon kills it and restarts it if this lasts. Continue it (SIGCONT) if you have stopped it."
    if not process.needed:
        return Check(name, "ok", "not needed now", of=of)
    if not process.alive or not (process.reported or process.first_start):
        return bad(f"it ended {_seconds(process.seconds)} ago and has not come back{words}", restarting)
    if not process.reported:
        if process.seconds > START_SECONDS:
            return bad(f"it has not come up within {_seconds(process.seconds)}", "Read its lines in the log.")
        return Check(name, "ok", f"starting for {_seconds(process.seconds)}", of=of)
    silent = _seconds(process.silent_seconds)
    if process.suspended and process.silent_seconds > SUSPENDED_SECONDS:
        return bad(f"a signal has stopped it; it has not reported for {silent}", hung)
    if process.idle_seconds > SILENT_SECONDS:
        return bad(f"it hangs: it has not reported for {silent} and uses no processor time", hung)
    if process.phase != STARTING and process.silent_seconds > max(LONG_ROUND_SECONDS, 10 * process.longest):
        before = _seconds(process.longest)
        return bad(f"it computes and has not reported for {silent}; before, {before} at most", hung, "warn")
    return Check(name, "ok", _describe_phase(process), of=of)


def _describe_phase(process: ProcessFacts) -> str:
    if process.phase == REPLAYING:
        return f"replaying rounds {process.first:,} to {process.last or process.first:,}"
    return "running" if process.phase == ENDED else process.phase


def _judge_progress(facts: Facts) -> Check:
    """Judge whether rounds are made while tasks wait, and at which pace."""

    def bad(level: Level, evidence: str) -> Check:
        advice = "See the trainer's lines in the log; if nothing else fails, restart the daemon and report the log."
        return Check("progress", level, evidence, advice, (LEARNING,))

    usual, waiting = facts.usual_seconds, f"{facts.pending:,} {'task waits' if facts.pending == 1 else 'tasks wait'}"
    known = "" if usual is None else f"; a round usually takes {_seconds(usual)}"
    # One long round is not a stall: while it computes, the trainer is silent.
    limit = LONGEST_STALL_SECONDS if facts.trainer.silent_seconds > 1.0 else STALLED_SECONDS
    limit = max(limit, 20 * (usual or 0.0), 20 * facts.trainer.longest)
    if not facts.pending:
        return Check("progress", "ok", "no task waits", of=(LEARNING,))
    if facts.stalled_seconds > limit:
        return bad("fail", f"{waiting}, and no round was made for {_seconds(facts.stalled_seconds)}{known}")
    recent = facts.recent_seconds
    if usual is not None and recent is not None and recent > 5 * usual:
        return bad("warn", f"{waiting}, and a round takes {_seconds(recent)} now{known}")
    return Check("progress", "ok", f"{waiting}{known}", of=(LEARNING,))


def _judge_restarts(facts: Facts) -> Check:
    if facts.deaths >= 2:
        evidence = f"the trainer ended {facts.deaths} times in a row at round {facts.rounds:,}"
        evidence += f" ({facts.trainer.last_words})" if facts.trainer.last_words else ""
        advice = "The task of this round, or the model, ends the trainer: read its last lines in the log."
        return Check("restarts", "fail", evidence, advice, (LEARNING,))
    return Check("restarts", "ok", f"{facts.trainer.restarts} since the daemon started", of=(LEARNING,))


def _judge_disk(facts: Facts) -> Check:
    """Judge the free space of the run's disk, and whether the last writes succeeded."""
    free, total = facts.free_bytes, facts.total_bytes
    evidence = f"{_size(free)} of {_size(total)} are free"
    advice = "Free space on the disk of the run. Nothing that was acknowledged is lost."
    processes = (facts.trainer, facts.comparators, facts.maintenance)
    refused = next((one.last_words for one in processes if one.cause == DISK), "")
    if facts.commit_error or refused:
        evidence = f"{facts.commit_error or refused} ({evidence})"
        return Check("disk", "fail", evidence, advice, (INGEST, LEARNING))
    if free < min(64 * MIB, total // 100):
        return Check("disk", "fail", evidence, advice, (INGEST, LEARNING))
    if free < min(GIB, total // 20):
        return Check("disk", "warn", evidence, advice, (INGEST, LEARNING))
    return Check("disk", "ok", evidence, of=(INGEST, LEARNING))


def _judge_backlog(facts: Facts) -> Check:
    """Judge how full the backlog is; a full one is no failure: senders wait."""
    evidence = f"{facts.pending:,} of {facts.backlog_limit:,} tasks are pending"
    if facts.pending < 0.8 * facts.backlog_limit:
        return Check("backlog", "ok", evidence)
    advice = "Tasks arrive faster than they are learned: send fewer, make rounds cheaper, or add ranks."
    if facts.pending >= facts.backlog_limit:
        evidence += "; new tasks get status 429 until some are learned"
    return Check("backlog", "warn", evidence, advice)


def _judge_source(facts: Facts, source: SourceFacts) -> Check:
    """Judge a source; if clients can still submit over HTTP, its failure does not close that door."""
    name, of = f"source:{source.name}", () if facts.takes_http else (INGEST,)
    advice = "Is its server up, and does the network reach it? The daemon tries again by itself and loses no entry."
    if source.error:
        level: Level = "fail" if source.seconds > SOURCE_SECONDS else "warn"
        return Check(name, level, f"cannot be read for {_seconds(source.seconds)}: {source.error}", advice, of)
    silent, full = source.silent_seconds, facts.pending >= facts.backlog_limit
    if silent is not None and silent > SOURCE_SILENT_SECONDS and not full:
        return Check(name, "warn", f"it has not answered for {_seconds(silent)}", advice, of)
    if source.lost:
        return Check(name, "warn", source.lost, "Let the broker keep its entries for longer, then restart.", of)
    return Check(name, "ok", "it answers" if source.answered else "connecting", of=of)


def _judge_answers(facts: Facts) -> Check:
    if facts.published:
        return Check("answers", "ok", "meta-parameters are published", of=(ANSWERS,))
    evidence, advice = "no meta-parameters are published yet", "Wait until the trainer has started."
    return Check("answers", "fail", evidence, advice, (ANSWERS,))


def _judge_checkpoint(facts: Facts) -> Check:
    """Judge the age of the newest checkpoint, in rounds and in seconds."""
    since, every = facts.rounds - facts.checkpoint_round, facts.checkpoint_every
    evidence = f"{since:,} rounds since the last one; one is due every {every:,}"
    if since > 3 * every and facts.checkpoint_seconds > CHECKPOINT_SECONDS:
        advice = "A restart would repeat these rounds. Is the disk slow? See the trainer's lines in the log."
        return Check("checkpoint", "warn", evidence, advice)
    return Check("checkpoint", "ok", evidence)


def _judge_archive(facts: Facts) -> Check:
    """Judge whether the archive of sealed rounds can be reached; a trainer that could not read it fails it."""
    advice = "Is the archive's server up, or its disk mounted? Arrivals stay durable without it."
    refused = facts.trainer.last_words if facts.trainer.cause == ARCHIVE else ""
    if refused:
        return Check("archive", "fail", f"the trainer ended: {refused}", advice, (LEARNING,))
    if facts.archive_error:
        return Check("archive", "warn", facts.archive_error, advice, (LEARNING,))
    if facts.archive_seconds > ARCHIVE_SECONDS:
        waited = _seconds(facts.archive_seconds)
        return Check("archive", "warn", f"it has not answered for {waited}", advice, (LEARNING,))
    return Check("archive", "ok", "it answers", of=(LEARNING,))


def _judge_divergence(facts: Facts) -> Check:
    """Judge the share of skipped rounds and meta-steps, and the rollbacks, over the last rounds."""
    last = facts.last
    advice = "The leader diverges: lower meta.lr or meta.clip_norm, and compare with `online-meta replay`."
    steps = last.skipped_steps / last.steps if last.steps >= FEWEST_ROUNDS else 0.0
    failed = last.skipped + last.charged
    rounds = failed / last.rounds if last.rounds >= FEWEST_ROUNDS else 0.0
    evidence = f"of the last {last.rounds} rounds {failed:.0f} had no finite loss, and {last.skipped_steps:.0f} of "
    evidence += f"{last.steps:.0f} meta-steps were skipped; {last.rollbacks} rollbacks"
    if last.rollbacks >= 2 or max(steps, rounds) > 0.5:
        return Check("divergence", "fail", evidence, advice, (LEARNING,))
    if last.rollbacks or max(steps, rounds) > 0.05:
        return Check("divergence", "warn", evidence, advice, (LEARNING,))
    return Check("divergence", "ok", evidence, of=(LEARNING,))


def _judge_adaptation(facts: Facts) -> Check:
    """Judge whether adaptation lowers the loss on new tasks."""
    last, played = facts.last, facts.last.rounds - facts.last.skipped - facts.last.quarantined
    if played < FEWEST_ROUNDS:
        return Check("adaptation", "ok", f"judged after {FEWEST_ROUNDS} rounds")
    if last.charged:
        return Check("adaptation", "ok", f"not judged: {last.charged:.0f} of the last rounds had no finite loss")
    before, after = last.loss_before / played, last.loss_after / played
    evidence = f"mean loss {before:.4g} before adaptation and {after:.4g} after, last {played:.0f} rounds"
    if after > before:
        advice = "Adaptation hurts: lower inner.lr or inner.steps, or use `[inner] rule` with learned rates."
        return Check("adaptation", "warn", evidence, advice)
    return Check("adaptation", "ok", evidence)


def _judge_calibration(facts: Facts) -> Check:
    """Judge whether targets lie where the answers expect them as often as they should."""
    last = facts.last
    if not last.targets:
        return Check("calibration", "ok", "the loss says no distribution of the targets")
    if last.targets < FEWEST_TARGETS:
        return Check("calibration", "ok", f"judged after {FEWEST_TARGETS} predicted targets")
    if last.coverage is not None:
        evidence = f"{last.coverage:.0%} of the last {last.targets:,} targets lay in their interval of 90 %"
        if last.coverage < LEAST_COVERAGE:
            advice = "Answers are too sure: use a larger sigma, loss = 'gaussian', or [inner] posterior = 'samples'."
            return Check("calibration", "warn", evidence, advice)
        if last.coverage > MOST_COVERAGE:
            advice = "Answers are too unsure: use a smaller sigma, or loss = 'gaussian', which learns it."
            return Check("calibration", "warn", evidence, advice)
        return Check("calibration", "ok", evidence)
    error = last.calibration_error or 0.0
    evidence = f"probabilities are {error:.0%} from the shares of the last {last.targets:,} targets"
    if error > MOST_CALIBRATION_ERROR:
        advice = "Do not rely on the probabilities: take fewer inner steps, or let the pool answer."
        return Check("calibration", "warn", evidence, advice)
    return Check("calibration", "ok", evidence)


def _judge_quarantine(facts: Facts) -> Check:
    count, rounds = facts.last.quarantined, facts.last.rounds
    evidence = f"{count:.0f} of the last {rounds} rounds are in quarantine"
    if count:
        return Check("quarantine", "warn", evidence, "See `online-meta quarantine list` for the reasons.", (LEARNING,))
    return Check("quarantine", "ok", evidence, of=(LEARNING,))


JUDGES: tuple[Callable[[Facts], Check], ...] = (
    _judge_daemon,
    _judge_disk,
    _judge_backlog,
    _judge_trainer,
    _judge_restarts,
    _judge_progress,
    _judge_divergence,
    _judge_quarantine,
    _judge_adaptation,
    _judge_calibration,
    _judge_checkpoint,
    _judge_archive,
    _judge_maintenance,
    _judge_comparators,
    _judge_answers,
)
"""The functions that compute the checks, the most important first; the checks of sources follow them."""


def _seconds(seconds: float) -> str:
    """Return a duration as text, such as "0.02 s", "45 s", "3 m 20 s" or "2 h 5 m"."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} m {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} m"


def _size(count: int) -> str:
    """Return a number of bytes as text, such as "512 MiB" or "3.4 GiB"."""
    return f"{count / MIB:.3g} MiB" if count < GIB else f"{count / GIB:,.1f} GiB"
