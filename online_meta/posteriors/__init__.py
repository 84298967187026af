"""Posteriors, one per file: what is believed of a task after the inner loop.

A file NAME.py defines a function NAME(**options) -> ``Posterior``, available as ``posteriors.NAME``; the registry finds
it by its file name. Files whose names begin with _ are not entries.

- All options are keyword-only with defaults. The function raises ``ValueError`` for an option out of range.
- A posterior maps (inner, meta, support, samples, stops) to one ``Belief`` for each number of inner steps in
  ``stops``, which ascend. All come from one trajectory (of each sample), and each equals to the bit the belief of that
  stop alone.
- A belief has ``params`` of the names and dtypes of the model's weights, with a first dimension of S, and
  ``log_weights`` (S,), whose exponentials sum to 1. The outer loop does not differentiate it.
- A support set of 0 rows takes no step, whatever the stop.
- It is a pure function: the same arguments give the same bits, and it does not write to them. Draws depend on the inner
  loop's seed and the support set. With ``samples`` = 1, the belief is ``inner.adapt(meta, support)``.
- It raises ``ValueError``, with the cure, for an inner loop or a number of samples that it does not fit.
- It works under ``torch.func.vmap`` if the loss and the rule do.
"""

import sys

from online_meta import registry
from online_meta.inner import Posterior

# Importing a submodule binds its name here to the module; bind each name to the file's function instead.
_posteriors = sys.modules[__name__]
globals().update({name: registry.load(_posteriors, name) for name in registry.file_names(_posteriors)})

__all__ = ["Posterior"]
