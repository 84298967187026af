"""The facts that the health of a run is computed from."""

from dataclasses import dataclass, field

from trainers.journal.heartbeat import WAITING

MIB, GIB = 2**20, 2**30
WINDOW_ROUNDS = 100
"""The number of last rounds whose sums are judged."""


@dataclass(frozen=True)
class ProcessFacts:
    """What is known about a child process; see ``Heartbeat`` for phase, first, last and problem.

    Attributes:
        needed: whether the process should run now.
        alive: whether it runs.
        reported: whether the process that runs now has sent a heartbeat.
        first_start: whether no process of this name has sent one since the daemon started.
        seconds: since it started, or since its predecessor ended.
        suspended: whether a signal has stopped it.
        silent_seconds: since its last heartbeat.
        idle_seconds: since it last used processor time; 0 while it reports.
        longest: its longest silence so far, in seconds.
        restarts: how often it was restarted since the daemon started.
        last_words: why its predecessor ended; "" if that is not known.
        cause: ``DISK`` or ``ARCHIVE`` if the predecessor has just ended for that.
    """

    needed: bool = True
    alive: bool = True
    reported: bool = True
    first_start: bool = False
    seconds: float = 0.0
    phase: str = WAITING
    first: int = 0
    last: int | None = None
    problem: str = ""
    suspended: bool = False
    silent_seconds: float = 0.0
    idle_seconds: float = 0.0
    longest: float = 0.0
    restarts: int = 0
    last_words: str = ""
    cause: str | None = None


@dataclass(frozen=True)
class SourceFacts:
    """What is known about a source that the daemon reads.

    Attributes:
        name: of the source.
        error: of the last attempt; "" if it succeeded.
        seconds: since the first failure in a row; 0 without an error.
        silent_seconds: since it last answered; None if its silence means nothing.
        answered: whether it has answered since the daemon started.
        lost: what its broker deleted before it was read; "" for nothing.
    """

    name: str
    error: str = ""
    seconds: float = 0.0
    silent_seconds: float | None = None
    answered: bool = True
    lost: str = ""


@dataclass(frozen=True)
class WindowFacts:
    """Sums over the last ``WINDOW_ROUNDS`` rounds.

    Attributes:
        rounds: how many they are.
        skipped: rounds without a loss.
        steps: meta-steps.
        skipped_steps: meta-steps that changed nothing.
        loss_before: sum of the leader's losses before adaptation.
        loss_after: sum of its losses after adaptation.
        rollbacks: rollbacks of the leader.
        quarantined: rounds in quarantine.
        charged: rounds in which the leader's loss was not finite.
        targets: targets whose distribution the run has predicted; 0 if its loss is no distribution.
        coverage: the share of them in the central interval of 90 %; None for classes.
        calibration_error: of classes, how far shares are from probabilities; None for numbers.
    """

    rounds: int = 0
    skipped: float = 0.0
    steps: float = 0.0
    skipped_steps: float = 0.0
    loss_before: float = 0.0
    loss_after: float = 0.0
    rollbacks: int = 0
    quarantined: float = 0.0
    charged: float = 0.0
    targets: int = 0
    coverage: float | None = None
    calibration_error: float | None = None


@dataclass(frozen=True)
class Facts:
    """Everything that the checks are computed from.

    Attributes:
        draining: whether the daemon stops.
        trainer, comparators, maintenance: the child processes.
        forks: the processes that play further branches of the run, by name.
        pending: tasks that wait to be learned.
        backlog_limit: the largest number of them.
        rounds: rounds that are learned or skipped.
        stalled_seconds: for which tasks wait, the trainer runs, and no round was made or replayed.
        usual_seconds: that a round takes while tasks wait; None if not known.
        recent_seconds: the same over the last minute; None if tasks did not wait all the time.
        deaths: recent ends of the trainer in a row without a new round, for a cause of its own.
        free_bytes: that the disk of the run has left.
        total_bytes: size of that disk.
        commit_error: of the last commit of tasks; "" if it succeeded.
        takes_http: whether clients may submit tasks over HTTP.
        sources: the sources that the daemon reads.
        published: whether meta-parameters are published, with which the daemon answers.
        compared: rounds that the oldest comparator covers; None without comparators.
        compared_every: rounds after which a comparator is due.
        checkpoint_round: round of the last checkpoint; 0 without one.
        checkpoint_seconds: since the last checkpoint, or since the daemon started.
        checkpoint_every: rounds after which a checkpoint is due.
        archive_error: of the last look at the archive; "" if it succeeded or there is none.
        archive_seconds: since the archive was asked; 0 if it has answered.
        last: sums over the last rounds.
    """

    draining: bool = False
    trainer: ProcessFacts = ProcessFacts()
    comparators: ProcessFacts = ProcessFacts()
    maintenance: ProcessFacts = ProcessFacts()
    forks: tuple[tuple[str, ProcessFacts], ...] = ()
    pending: int = 0
    backlog_limit: int = 1000
    rounds: int = 0
    stalled_seconds: float = 0.0
    usual_seconds: float | None = None
    recent_seconds: float | None = None
    deaths: int = 0
    free_bytes: int = 100 * GIB
    total_bytes: int = 200 * GIB
    commit_error: str = ""
    takes_http: bool = True
    sources: tuple[SourceFacts, ...] = ()
    published: bool = True
    compared: int | None = None
    compared_every: int = 100
    checkpoint_round: int = 0
    checkpoint_seconds: float = 0.0
    checkpoint_every: int = 25
    archive_error: str = ""
    archive_seconds: float = 0.0
    last: WindowFacts = field(default=WindowFacts())
