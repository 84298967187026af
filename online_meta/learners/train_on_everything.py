"""Train on everything: one model for all tasks, trained jointly, never adapted."""

from dataclasses import replace

from online_meta.inner import Inner
from online_meta.learners import LearnerContext
from online_meta.learners.ftml import FollowTheMetaLeader
from online_meta.metagrads.supervised import supervised
from online_meta.types import MetaGradient

SEED_OFFSET = 1
"""Sets this learner's draws apart from those of others with the same seed."""


def build(context: LearnerContext) -> FollowTheMetaLeader:
    """Return the baseline *train on everything* (Finn et al., ICML 2019, section 5).

    It follows the leader of sum_{k<=t} f_k(w), without U_k: support and query of past rounds train one
    model, which answers a new task as it is (loss before adaptation = after). It revisits as many tasks a
    step as FTML and makes steps + 1 as many steps: as many gradients as FTML takes in its inner loops.
    """
    inner = replace(context.inner, steps=0)
    return build_follower(context, inner, supervised(inner), SEED_OFFSET, context.inner.steps + 1)


def build_follower(
    context: LearnerContext, inner: Inner, gradient: MetaGradient, seed_offset: int, steps_factor: int = 1
) -> FollowTheMetaLeader:
    """Return a baseline that trains with another ``gradient`` and ``steps_factor`` times FTML's meta-steps.

    New tasks are met by ``inner``; ``seed_offset`` sets its draws apart from those of others with the same seed.
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
    )
