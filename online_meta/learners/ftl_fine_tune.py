"""Follow the leader and fine-tune: one model trained on everything, that adapts to each task as it is met."""

from dataclasses import replace

from online_meta.learners import LearnerContext
from online_meta.learners.ftml import FollowTheMetaLeader
from online_meta.learners.train_on_everything import build_follower
from online_meta.metagrads.supervised import supervised

SEED_OFFSET = 3
"""Sets this learner's draws apart from those of others with the same seed."""


def build(context: LearnerContext) -> FollowTheMetaLeader:
    """Return the baseline *FTL* (Finn et al., ICML 2019, section 5): w_{t+1} ~ argmin_w sum_{k<=t} f_k(w).

    It is trained as *train on everything* is, without U_k, on as many gradients; but a new task is answered with
    U_t(w_t), after the inner loop of the run on its support set.
    """
    return build_follower(
        context, context.inner, supervised(replace(context.inner, steps=0)), SEED_OFFSET, context.inner.steps + 1
    )
