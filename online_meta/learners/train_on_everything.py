"""Train on everything: train one model jointly on all tasks, without adaptation."""

from dataclasses import replace
from typing import Annotated

from annotated_types import Ge, Gt

from online_meta.answers import answer_once
from online_meta.inner import Inner
from online_meta.learners import LR, OPTIMIZER, LearnerContext, use_own_optimizer
from online_meta.learners.ftml import FollowTheMetaLeader
from online_meta.metagrads.supervised import supervised
from online_meta.types import MetaGradient

META_LEARNS = False

SEED_OFFSET = 1
"""Added to the seed, so that this learner draws differently from others with the same seed."""


Steps = Annotated[int, Ge(1)] | None
"""Steps after each round; None for the baseline's default."""


def build(
    context: LearnerContext, optimizer: str = OPTIMIZER, lr: Annotated[float, Gt(0)] = LR, steps: Steps = None
) -> FollowTheMetaLeader:
    """Create the baseline *train on everything* (Finn et al., ICML 2019, section 5).

    It follows the leader of sum_{k<=t} f_k(w), without U_k: one model is trained on support and query of past rounds,
    and is scored without adaptation (the losses before and after are equal). It revisits as many tasks per step as
    FTML.

    Args:
        context: what all learners share.
        optimizer: the optimizer of its weights, as in [meta].
        lr: its learning rate, above 0, constant over the rounds.
        steps: steps after each round; by default (inner steps + 1) times as many as FTML makes, so that both compute
            the same number of gradients.
    """
    inner = replace(answer_once(context.inner), steps=0)
    steps = context.steps_per_round * (context.inner.steps + 1) if steps is None else steps
    return build_follower(use_own_optimizer(context, optimizer, lr), inner, supervised(inner), SEED_OFFSET, steps)


def build_follower(
    context: LearnerContext, inner: Inner, gradient: MetaGradient, seed_offset: int, steps: int
) -> FollowTheMetaLeader:
    """Create a baseline that makes ``steps`` after each round with another ``gradient``.

    ``inner`` adapts to new tasks; ``seed_offset`` is added to the seed.
    """
    return FollowTheMetaLeader(
        inner,
        gradient,
        context.engine(context.start),
        replay=context.replay,
        batch=context.batch,
        steps_per_round=steps,
        seed=context.seed + seed_offset,
        buffer=context.buffer,
        programs=context.programs,
        schedule=context.schedule,
        gather=context.gather,
        failures=context.failures,
        draw=context.draw._replace(weighs=True),
    )
