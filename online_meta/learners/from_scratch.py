"""From scratch: train a new model for every task on its support set alone."""

from collections.abc import Sequence
from dataclasses import replace

from online_meta.learners import LearnerContext
from online_meta.regret.scoring import ScoredTasks, score_task
from online_meta.rules.adam import adam
from online_meta.types import Learned, Meta, Params, Score, StepReport, Task, TensorFilter


class FromScratch:
    """The baseline that trains random weights on each task's support set and carries nothing over.

    It is a baseline of Finn et al., ICML 2019, section 5.
    """

    engine = None
    lr_scale = 1.0

    def __init__(self, context: LearnerContext, steps: int, lr: float) -> None:
        """Start at round 0; each model is trained with ``steps`` steps of Adam at learning rate ``lr``."""
        self._context = context
        self._training = replace(context.inner, rule=adam(lr), steps=steps, fast=("*",))
        self._round = 0
        self._scored = ScoredTasks()

    def score(self, task: Task, prefixes: Sequence[int] = ()) -> Score:
        """Train random weights on the support set; return the query losses before and after."""
        weights = self._context.draw_weights(self._round + self._scored.add(task))
        return score_task(self._training, Meta(weights, {}), task, self._context.accuracy, prefixes)

    def learn(self, *tasks: Task) -> Learned:
        """Learn nothing; only count the rounds."""
        self._scored.take(tasks)
        self._round += len(tasks)
        return Learned((), ())

    def learn_more(self, update: int) -> tuple[StepReport, ...]:
        """Do nothing: this learner does not revisit past tasks."""
        return ()

    def save(self, keep: TensorFilter | None = None) -> Params:
        """Return an empty state: nothing is learned."""
        return {}

    def load(self, saved: Params, rounds: int) -> None:
        """Continue at round ``rounds``."""
        self._round, self._scored = rounds, ScoredTasks()


def build(context: LearnerContext, steps: int = 100, lr: float = 0.003) -> FromScratch:
    """Create the baseline with ``steps`` (at least 0) training steps of Adam at learning rate ``lr`` (above 0)."""
    return FromScratch(context, steps, lr)
