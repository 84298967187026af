"""Train on everything: train one model jointly on all tasks, without adaptation."""

from dataclasses import replace

from online_meta.inner import Inner
from online_meta.learners import LearnerContext
from online_meta.learners.ftml import FollowTheMetaLeader
from online_meta.metagrads.supervised import supervised
from online_meta.types import MetaGradient

SEED_OFFSET = 1
"""Added to the seed, so that this learner draws differently from others with the same seed."""


def build(context: LearnerContext) -> FollowTheMetaLeader:
    """Create the baseline *train on everything* (Finn et al., ICML 2019, section 5).

    It follows the leader of sum_{k<=t} f_k(w), without U_k: one model is trained on support and query of past rounds,
    and is scored without adaptation (the losses before and after are equal). It revisits as many tasks per step as
    FTML, and makes (inner steps + 1) times as many steps, so both compute the same number of gradients.
    """
    inner = replace(context.inner, steps=0)
    return build_follower(context, inner, supervised(inner), SEED_OFFSET, context.inner.steps + 1)


def build_follower(
    context: LearnerContext, inner: Inner, gradient: MetaGradient, seed_offset: int, steps_factor: int = 1
) -> FollowTheMetaLeader:
    """Create a baseline that trains with another ``gradient`` and ``steps_factor`` times FTML's meta-steps.

    ``inner`` adapts to new tasks; ``seed_offset`` is added to the seed.
    """
    return FollowTheMetaLeader(
        inner,
        gradient,
        context.engine(context.start),
        replay=context.replay,
        batch=context.batch,
        steps_per_round=context.steps_per_round * steps_factor,
        seed=context.seed + seed_offset,
        buffer=context.buffer,
        accuracy=context.accuracy,
        programs=context.programs,
        schedule=context.schedule,
        gather=context.gather,
        failures=context.failures,
    )
