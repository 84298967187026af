"""The state of an open run."""

from collections.abc import Callable
from dataclasses import dataclass, field

from online_meta.batching.failures import TaskFailures
from online_meta.functional.recording import Recorder
from online_meta.learners.pool import Pool
from online_meta.regret.scoring import Measure, measure_answers
from online_meta.types import Learner, StepReport
from streams.history.history import History
from trainers.build import AnsweringLearner
from trainers.distributed.process_group import AdaptiveTimeout
from trainers.distributed.rank_stats import RankStats
from trainers.distributed.ranks import RankGroup
from trainers.journal.heartbeat import HeartbeatWriter
from trainers.journal.journal import RunJournal, close_journal
from trainers.journal.run_files import RunFiles
from trainers.learner_settings import POOL, has_pool
from trainers.loop.async_checkpoint import BackgroundTask
from trainers.loop.batching_plan import PlanSelector
from trainers.loop.task_prefetch import HistoryBuffer
from trainers.seen_inputs import SeenInputs
from trainers.settings import TrainerSettings


@dataclass
class Run:
    """The state of an open run on one rank.

    Only the coordinator has a ``journal``. The first of the ``learners`` leads: its meta-steps decide whether the run
    goes on or rolls back. ``reopen`` opens the run again at its newest checkpoint; a collective.
    """

    settings: TrainerSettings
    files: RunFiles
    history: History | None
    learners: dict[str, Learner]
    answering: AnsweringLearner
    buffer: HistoryBuffer
    plan_selector: PlanSelector
    rank_group: RankGroup
    rank_stats: RankStats
    checkpoint_task: BackgroundTask
    rank_timeout: AdaptiveTimeout
    journal: RunJournal | None
    heartbeat: HeartbeatWriter
    failures: TaskFailures
    reopen: Callable[[], "Run"]
    round: int = 0
    last_checkpoint: int = 0
    won: str | None = None
    """The name that the leading learner had before it won the race between settings; None if there was none."""
    seen: SeenInputs = field(default_factory=SeenInputs)
    """The ranges of the inputs of all rounds."""
    excluded: int = 0
    """Number of quarantined rounds that the buffer leaves out."""
    idle_steps: list[StepReport] = field(default_factory=list)
    measure: Measure = field(default_factory=lambda: Recorder(measure_answers))
    idle_updates: int = 0
    """Number of updates on past rounds since the last round; ``idle_steps`` are their meta-steps."""

    @property
    def pool(self) -> Pool | None:
        """The pool, if one plays."""
        found = self.learners.get(POOL) if has_pool(self.settings) else None
        return found if isinstance(found, Pool) else None

    @property
    def leader_name(self) -> str:
        """The name of the learner that leads: the first one."""
        return next(iter(self.learners))


def close_run(run: Run) -> None:
    """Stop compilations and prefetching, finish the checkpoint in progress, and close the run's files."""
    run.plan_selector.close()
    run.checkpoint_task.close()
    run.buffer.close()
    if run.journal:
        close_journal(run.journal)
