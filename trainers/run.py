"""An open run."""

from collections.abc import Callable
from dataclasses import dataclass, field

from online_meta.types import Learner, Meta, StepReport
from streams.history import History
from trainers.aside import Aside
from trainers.crew import Crew
from trainers.desk import Desk
from trainers.past import HistoryPast
from trainers.paths import Steering
from trainers.patience import Patience
from trainers.run_files import RunFiles
from trainers.settings import TrainerSettings
from trainers.timing import Timing


@dataclass
class Run:
    """An open run: what is played, by whom, and, on the rank that leads, the files it is written to."""

    settings: TrainerSettings
    files: RunFiles
    history: History | None
    learners: dict[str, Learner]
    leader: Callable[[], Meta]
    past: HistoryPast
    steering: Steering
    crew: Crew
    timing: Timing
    writing: Aside
    patience: Patience
    desk: Desk | None
    round: int = 0
    checkpointed: int = 0
    more: list[StepReport] = field(default_factory=list)
    updates: int = 0
    """How many updates on past rounds alone were made before ``round``, and their steps: ``more``."""
