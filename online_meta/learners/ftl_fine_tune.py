"""Follow the leader and fine-tune: train one model on everything and adapt it to each new task."""

from dataclasses import replace
from typing import Annotated

from annotated_types import Gt

from online_meta.learners import LR, OPTIMIZER, LearnerContext, use_own_optimizer
from online_meta.learners.ftml import FollowTheMetaLeader
from online_meta.learners.train_on_everything import Steps, build_follower
from online_meta.metagrads.supervised import supervised

META_LEARNS = False

SEED_OFFSET = 3
"""Added to the seed, so that this learner draws differently from others with the same seed."""


def build(
    context: LearnerContext, optimizer: str = OPTIMIZER, lr: Annotated[float, Gt(0)] = LR, steps: Steps = None
) -> FollowTheMetaLeader:
    """Create the baseline *FTL* (Finn et al., ICML 2019, section 5): w_{t+1} ~ argmin_w sum_{k<=t} f_k(w).

    It is trained like *train on everything*, without U_k, and with the same options. A new task is scored with
    U_t(w_t): the run's inner loop adapts to its support set.

    Args:
        context: what all learners share.
        optimizer: the optimizer of its weights, as in [meta].
        lr: its learning rate, above 0, constant over the rounds.
        steps: steps after each round; by default (inner steps + 1) times as many as FTML makes.
    """
    gradient = supervised(replace(context.inner, steps=0))
    steps = context.steps_per_round * (context.inner.steps + 1) if steps is None else steps
    return build_follower(use_own_optimizer(context, optimizer, lr), context.inner, gradient, SEED_OFFSET, steps)
