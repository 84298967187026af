"""Train on everything: one model for all tasks, trained jointly, never adapted."""

from dataclasses import replace

from online_meta.inner import Inner
from online_meta.learners.ftml import FollowTheMetaLeader
from online_meta.metagrads.supervised import supervised
from online_meta.setup import LearnerSetup
from online_meta.types import MetaGradient

STREAM = 1
"""Sets this learner's draws apart from those of others with the same seed."""


def build(setup: LearnerSetup) -> FollowTheMetaLeader:
    """Return the baseline *train on everything* (Finn et al., ICML 2019, section 5).

    It follows the leader of sum_{k<=t} f_k(w), without U_k: support and query of past rounds train one
    model, which answers a new task as it is (loss before adaptation = after). It revisits as many tasks a
    step as FTML and makes steps + 1 as many steps: as many gradients as FTML takes in its inner loops.
    """
    inner = replace(setup.inner, steps=0)
    return build_from(setup, inner, supervised(inner), STREAM, setup.inner.steps + 1)


def build_from(
    setup: LearnerSetup, inner: Inner, gradient: MetaGradient, stream: int, times: int = 1
) -> FollowTheMetaLeader:
    """Return a baseline that follows its leader by another ``gradient``, with so many ``times`` FTML's meta-steps.

    New tasks are met by ``inner``; ``stream`` sets its draws apart from those of others with the same seed.
    """
    return FollowTheMetaLeader(
        inner,
        gradient,
        setup.engine(setup.start),
        replay=setup.replay,
        batch=setup.batch,
        steps_per_round=setup.steps_per_round * times,
        seed=setup.seed + stream,
        past=setup.past,
        accuracy=setup.accuracy,
        programs=setup.programs,
        schedule=setup.schedule,
        gather=setup.gather,
    )
