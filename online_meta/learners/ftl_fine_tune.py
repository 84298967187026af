"""Follow the leader and fine-tune: train one model on everything and adapt it to each new task."""

from dataclasses import replace

from online_meta.learners import LearnerContext
from online_meta.learners.ftml import FollowTheMetaLeader
from online_meta.learners.train_on_everything import build_follower
from online_meta.metagrads.supervised import supervised

SEED_OFFSET = 3
"""Added to the seed, so that this learner draws differently from others with the same seed."""


def build(context: LearnerContext) -> FollowTheMetaLeader:
    """Create the baseline *FTL* (Finn et al., ICML 2019, section 5): w_{t+1} ~ argmin_w sum_{k<=t} f_k(w).

    It is trained like *train on everything*, without U_k, with the same number of gradients. A new task is scored with
    U_t(w_t): the run's inner loop adapts to its support set.
    """
    return build_follower(
        context, context.inner, supervised(replace(context.inner, steps=0)), SEED_OFFSET, context.inner.steps + 1
    )
