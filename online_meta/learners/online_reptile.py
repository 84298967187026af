"""Online Reptile: follow the meta-leader by first-order steps towards the adapted weights."""

from online_meta.learners import LearnerContext
from online_meta.learners.ftml import FollowTheMetaLeader
from online_meta.learners.train_on_everything import build_follower
from online_meta.metagrads.reptile import reptile

SEED_OFFSET = 4
"""Added to the seed, so that this learner draws differently from others with the same seed."""


def build(context: LearnerContext) -> FollowTheMetaLeader:
    """Create FTML with Reptile's direction w - phi_K in place of the meta-gradient (Nichol et al., 2018)."""
    return build_follower(context, context.inner, reptile(context.inner), SEED_OFFSET)
