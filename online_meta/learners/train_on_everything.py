"""Train on everything: train one model jointly on all tasks, without adaptation."""

from dataclasses import replace
from typing import Annotated, NamedTuple

from annotated_types import Ge, Gt

from online_meta.inner import Inner
from online_meta.learners import LearnerContext
from online_meta.learners.ftml import FollowTheMetaLeader
from online_meta.metagrads.supervised import supervised
from online_meta.types import MetaGradient

SEED_OFFSET = 1
"""Added to the seed, so that this learner draws differently from others with the same seed."""


Steps = Annotated[int, Ge(1)] | None
"""Steps after each round; None for the baseline's default."""
OPTIMIZER, LR = "adam", 1e-3
"""What a baseline steps with, unless its options say otherwise."""


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
    inner = replace(context.inner, steps=0, answer_steps=())
    steps = context.steps_per_round * (context.inner.steps + 1) if steps is None else steps
    return build_follower(context, inner, supervised(inner), SEED_OFFSET, OwnStepping(optimizer, lr, steps))


class OwnStepping(NamedTuple):
    """How a baseline steps: its ``optimizer``, its learning rate ``lr``, and its ``steps`` after each round."""

    optimizer: str
    lr: float
    steps: int


def build_follower(
    context: LearnerContext, inner: Inner, gradient: MetaGradient, seed_offset: int, own: OwnStepping
) -> FollowTheMetaLeader:
    """Create a baseline that trains with another ``gradient`` and ``own`` steps.

    ``inner`` adapts to new tasks; ``seed_offset`` is added to the seed. Without ``context.own_engine``, it steps with
    the engine and the schedule of FTML.
    """
    make = context.own_engine
    return FollowTheMetaLeader(
        inner,
        gradient,
        context.engine(context.start) if make is None else make(context.start, own.optimizer, own.lr),
        replay=context.replay,
        batch=context.batch,
        steps_per_round=own.steps,
        seed=context.seed + seed_offset,
        buffer=context.buffer,
        programs=context.programs,
        schedule=context.schedule if make is None else None,
        gather=context.gather,
        failures=context.failures,
    )
