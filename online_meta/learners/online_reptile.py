"""Online Reptile: follow the meta-leader by first-order steps towards the adapted weights."""

from typing import Annotated

from annotated_types import Gt

from online_meta.learners import LR, OPTIMIZER, LearnerContext, use_own_optimizer
from online_meta.learners.ftml import FollowTheMetaLeader
from online_meta.learners.train_on_everything import Steps, build_follower
from online_meta.metagrads.reptile import reptile

SEED_OFFSET = 4
"""Added to the seed, so that this learner draws differently from others with the same seed."""


def build(
    context: LearnerContext, optimizer: str = OPTIMIZER, lr: Annotated[float, Gt(0)] = LR, steps: Steps = None
) -> FollowTheMetaLeader:
    """Create FTML with Reptile's direction w - phi_K in place of the meta-gradient (Nichol et al., 2018).

    Args:
        context: what all learners share.
        optimizer: the optimizer of its weights, as in [meta].
        lr: its learning rate, above 0, constant over the rounds.
        steps: steps after each round; by default as many as FTML makes.
    """
    context, steps = use_own_optimizer(context, optimizer, lr), context.steps_per_round if steps is None else steps
    return build_follower(context, context.inner, reptile(context.inner), SEED_OFFSET, steps)
