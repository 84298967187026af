"""Learners as a user might write them: one that works, and some that cannot be served."""

from collections.abc import Sequence

import torch

from online_meta.batches import only_tensor
from online_meta.learners import LearnerContext
from online_meta.outcomes import outcome_of
from online_meta.prediction import mix, point
from online_meta.regret.scoring import answer_task, score_answers
from online_meta.types import (
    Batch,
    Learned,
    Params,
    Prediction,
    Score,
    State,
    StepReport,
    Task,
    TensorFilter,
    Tensors,
)


class Constant:
    """Answers with the mean of the support set's targets; it has no parameters of the model."""

    engine = None
    lr_scale = 1.0

    def __init__(self, context: LearnerContext) -> None:
        self.prior = torch.zeros(1)

    def state(self) -> State:
        return {"prior": self.prior}

    def predict(self, state: State, support: Batch, rows: int) -> Prediction:
        y = only_tensor(support.y)
        value = torch.cat([y, state["prior"][None]]).mean(0)
        return point(outcome_of(torch.nn.functional.mse_loss), value.expand(rows, 1))  # type: ignore[arg-type]

    def answers(self, state: State, support: Batch, x: Tensors) -> dict[str, Prediction]:
        return {"": self.predict(state, support, len(only_tensor(x)))}

    def scores(self, task: Task, prefixes: Sequence[int] = ()) -> dict[str, Score]:
        return score_answers(answer_task(self.answers, self.state(), task, prefixes), task)

    def score(self, task: Task, prefixes: Sequence[int] = ()) -> Score:
        return self.scores(task, prefixes)[""]

    def learn(self, *tasks: Task) -> Learned:
        return Learned((), ())

    def learn_more(self, update: int) -> tuple[StepReport, ...]:
        return ()

    def save(self, keep: TensorFilter | None = None) -> Params:
        return {}

    def load(self, saved: Params, rounds: int) -> None:
        pass


class Stateless(Constant):
    state = property()  # type: ignore[assignment]  # It has none.


class Nameless(Constant):
    def answers(self, state: State, support: Batch, x: Tensors) -> dict[str, Prediction]:
        return {"mean": self.predict(state, support, len(only_tensor(x)))}


class Short(Constant):
    def answers(self, state: State, support: Batch, x: Tensors) -> dict[str, Prediction]:
        return {"": self.predict(state, support, len(only_tensor(x)) - 1)}


class Unnormalised(Constant):
    def answers(self, state: State, support: Batch, x: Tensors) -> dict[str, Prediction]:
        found = self.predict(state, support, len(only_tensor(x)))
        return {"": found + found}


class Impure(Constant):
    calls = 0

    def answers(self, state: State, support: Batch, x: Tensors) -> dict[str, Prediction]:
        self.calls += 1
        found = self.predict(state, support, len(only_tensor(x)))
        later = self.predict({"prior": state["prior"] + self.calls}, support, len(only_tensor(x)))
        return {"": mix([found, later], [0.0, 0.0])}
