"""From scratch: train a new model for every task on its support set alone."""

from dataclasses import replace
from functools import lru_cache

from online_meta.answers import answer_once, believe_by_inner_loop
from online_meta.functional.randomness import checksum
from online_meta.learners import FunctionalLearner, LearnerContext
from online_meta.rules.adam import adam
from online_meta.types import Batch, Belief, Meta, State

META_LEARNS = False


def build(context: LearnerContext, steps: int = 100, lr: float = 0.003) -> FunctionalLearner:
    """Create the baseline that trains random weights on each task's support set and carries nothing over.

    It is a baseline of Finn et al., ICML 2019, section 5. The run's seed and the support set decide which weights are
    drawn, so it publishes nothing. Each model is trained with ``steps`` (at least 0) steps of Adam at learning rate
    ``lr`` (above 0).
    """
    inner = replace(answer_once(context.inner), rule=adam(lr), steps=steps, fast=("*",))

    draw_weights = lru_cache(maxsize=2)(context.draw_weights)  # The empty support set comes with every task.

    def draw(state: State, support: Batch) -> State:
        return draw_weights(checksum(support))

    def believe(weights: State, support: Batch) -> dict[str, Belief]:
        return believe_by_inner_loop(inner, Meta(weights, {}), support)

    return FunctionalLearner(inner, {}, believe, begin=draw, order_matters=True)
