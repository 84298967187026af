"""From scratch: a new model for every task, trained on its support set alone."""

from collections.abc import Sequence
from dataclasses import replace

from online_meta.learners import LearnerContext
from online_meta.regret.scoring import ScoredTasks, score_task
from online_meta.rules.adam import adam
from online_meta.types import Learned, Meta, Params, Score, StepReport, Task, TensorFilter


class FromScratch:
    """Each round draws random weights and trains them on the support set; nothing is carried over.

    The baseline of Finn et al., ICML 2019, section 5: what the task's own data alone can give.
    """

    def __init__(self, context: LearnerContext, steps: int, lr: float) -> None:
        """Begin at round 0; each model is trained by ``steps`` steps of Adam with learning rate ``lr``."""
        self._context = context
        self._training = replace(context.inner, rule=adam(lr), steps=steps, fast=("*",))
        self._round = 0
        self._scored = ScoredTasks()

    def score(self, task: Task, prefixes: Sequence[int] = ()) -> Score:
        """Train random weights on the support set; return the query losses before and after."""
        weights = self._context.draw_weights(self._round + self._scored.add(task))
        return score_task(self._training, Meta(weights, {}), task, self._context.accuracy, prefixes)

    def learn(self, *tasks: Task) -> Learned:
        """Learn nothing; the round counts."""
        self._scored.take(tasks)
        self._round += len(tasks)
        return Learned((), ())

    def learn_more(self, update: int) -> tuple[StepReport, ...]:
        """Learn nothing."""
        return ()

    def save(self, keep: TensorFilter | None = None) -> Params:
        """Nothing to keep."""
        return {}

    def load(self, saved: Params, rounds: int) -> None:
        """Go on at round ``rounds``."""
        self._round, self._scored = rounds, ScoredTasks()


def build(context: LearnerContext, steps: int = 100, lr: float = 0.003) -> FromScratch:
    """Return the baseline; too many steps overfit a small support set, too few leave the model untrained."""
    return FromScratch(context, steps, lr)
