"""Online Reptile: follow the meta-leader by first-order steps towards where the inner loops end."""

from online_meta.learners import LearnerContext
from online_meta.learners.ftml import FollowTheMetaLeader
from online_meta.learners.train_on_everything import build_follower
from online_meta.metagrads.reptile import reptile

SEED_OFFSET = 4
"""Sets this learner's draws apart from those of others with the same seed."""


def build(context: LearnerContext) -> FollowTheMetaLeader:
    """Return FTML's loop with Reptile's direction w - phi_K in place of the meta-gradient (Nichol et al., 2018)."""
    return build_follower(context, context.inner, reptile(context.inner), SEED_OFFSET)
