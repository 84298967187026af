"""Online meta-learning: Follow the Meta-Leader over a stream of few-shot tasks.

This package exports the names that a notebook needs; import it as ``import online_meta as om``.
"""

from online_meta import posteriors, rules
from online_meta.batching.over_tasks import over_tasks
from online_meta.functional.model import accuracy_of, model_loss, model_output
from online_meta.inner import Inner
from online_meta.learners.ftml import FollowTheMetaLeader
from online_meta.meta_optimizer import MetaOptimizer
from online_meta.metagrads.chaser import chaser
from online_meta.metagrads.exact import exact
from online_meta.metagrads.first_order import first_order
from online_meta.metagrads.hierarchical_variational import hierarchical_variational
from online_meta.metagrads.implicit import implicit
from online_meta.metagrads.laplace import laplace
from online_meta.metagrads.reptile import reptile
from online_meta.metagrads.supervised import supervised
from online_meta.metagrads.variational import variational
from online_meta.metagrads.warp_grad import warp_grad
from online_meta.preflight.preflight import Preflight, preflight
from online_meta.regret.ledger import Comparator, Regret, RegretLedger
from online_meta.types import Batch, Learned, Meta, MetaGrad, Params, Score, Task

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Comparator",
    "FollowTheMetaLeader",
    "Inner",
    "Learned",
    "Meta",
    "MetaGrad",
    "MetaOptimizer",
    "Params",
    "Preflight",
    "Regret",
    "RegretLedger",
    "Score",
    "Task",
    "accuracy_of",
    "chaser",
    "exact",
    "first_order",
    "hierarchical_variational",
    "implicit",
    "laplace",
    "model_loss",
    "model_output",
    "over_tasks",
    "posteriors",
    "preflight",
    "reptile",
    "rules",
    "supervised",
    "variational",
    "warp_grad",
]
