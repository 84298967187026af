"""From scratch: train a new model for every task on its support set alone."""

from collections.abc import Sequence
from dataclasses import replace

from online_meta.answers import believe_by_inner_loop, predict_each
from online_meta.functional.randomness import checksum
from online_meta.learners import LearnerContext
from online_meta.regret.scoring import ScoredTasks, score_answers
from online_meta.rules.adam import adam
from online_meta.types import (
    Batch,
    Belief,
    Learned,
    Meta,
    Params,
    Prediction,
    Score,
    State,
    StepReport,
    Task,
    TensorFilter,
    Tensors,
)


class FromScratch:
    """The baseline that trains random weights on each task's support set and carries nothing over.

    It is a baseline of Finn et al., ICML 2019, section 5.
    """

    engine = None
    lr_scale = 1.0

    def __init__(self, context: LearnerContext, steps: int, lr: float) -> None:
        """Start at round 0; each model is trained with ``steps`` steps of Adam at learning rate ``lr``."""
        self._draw_weights = context.draw_weights
        self.inner = replace(context.inner, rule=adam(lr), steps=steps, fast=("*",), answer_steps=())
        self._round = 0
        self._scored = ScoredTasks()

    def state(self) -> State:
        """Return no tensors: the weights are drawn from the run's seed and the support set."""
        return {}

    def believe(self, state: State, support: Batch) -> dict[str, Belief]:
        """Train random weights on a support set, which decides which weights are drawn."""
        return believe_by_inner_loop(self.inner, Meta(self._draw_weights(checksum(support)), {}), support)

    def answers(self, state: State, support: Batch, x: Tensors) -> dict[str, Prediction]:
        """Return the predictions under what ``believe`` returns; a pure function."""
        return predict_each(self.inner.loss, self.believe(state, support), x)

    def scores(self, task: Task, prefixes: Sequence[int] = ()) -> dict[str, Score]:
        """Return a score for each of ``answers`` to the next round's task, without changing the learner."""
        self._scored.add(task)
        return score_answers(self.answers, self.state(), task, prefixes)

    def score(self, task: Task, prefixes: Sequence[int] = ()) -> Score:
        """Return the score of the learner's own answer."""
        return self.scores(task, prefixes)[""]

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
