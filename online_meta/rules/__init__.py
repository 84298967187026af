"""Inner update rules, one per file: how the inner loop turns gradients into new fast weights.

A file NAME.py defines a function NAME(lr, **options) -> ``InnerRule``, available as ``rules.NAME``; the registry finds
it by its file name. Files whose names begin with _ are not entries.

- Every argument has a default, and ``lr`` is the first one, so that a rule can be made from a learning rate alone. The
  function raises ``ValueError`` for an option out of range.
- ``init(weights)`` returns the rule's learned parameters, a flat dict of tensors, empty if it learns nothing.
- ``start(rule, phi, support)`` returns the carry before the first step: phi_0 and the rule's state, a flat dict of
  tensors. phi_0 has all names of ``phi``. It may have more, of shapes that depend on the support set.
- ``update(rule, carry, seen, step)`` returns the carry after a step; ``step`` counts from 0. ``seen.loss`` is the
  support loss, ``seen.grads`` its gradient by all names of phi, and ``seen.size`` the number of samples. For a rule
  with ``sees="loss"`` no gradient is computed, and ``seen.grads`` is empty.
- ``view(rule, weights)`` returns the weights that the model is called with. It is given phi and the weights that do not
  adapt, or the weights alone; it leaves out names that the model does not have.
- A rule may have a ``head``: the phi that ``start`` is given then has, for the last linear layer of the model, what
  ``head.solve`` makes of the support set's features. ``Inner.answer_heads`` uses it with the parameters of ``init``.
- A rule that draws a part of phi may have ``infer``: what it draws it from, and what training draws it from instead.
  The estimator ``variational`` takes such rules.
- A rule may adapt several models: ``particles(rule, weights)`` then returns the views of all of them. The first is that
  of ``view``; for the weights alone, it is the only one. ``seen.loss`` is the sum of their losses.
- A rule that pulls back to its start, as ``proximal`` does, has ``strength``; ``laplace`` takes its prior from it.
- A rule whose phi is a normal distribution of the weights may have ``belief``: that distribution, and its prior.
  The estimator ``hierarchical_variational`` takes such rules.
- phi and the state keep their names, shapes and dtypes over all steps; a view has those of the weights.
- All four are pure and twice differentiable, and do not write to their arguments. They work under ``torch.func.vmap``
  unless ``random`` is True.
- ``start``, ``update`` and ``view`` of a rule with ``random="keyed"`` may draw, by ``normal_like`` and ``uniform_like``
  of ``online_meta/functional/keyed.py``. The numbers are functions of the seed, the task and the step, under ``vmap``
  and in compiled programs, too.
- Only ``start`` and ``update`` of a rule with ``random=True`` may draw torch's random numbers; the inner loop seeds
  them with the task and the step. Threads wait for each other there.
"""

import sys
from collections.abc import Callable

from online_meta import registry
from online_meta.types import InnerRule

# Importing a submodule binds its name here to the module; bind each name to the file's function instead.
_rules = sys.modules[__name__]
globals().update({name: registry.load(_rules, name) for name in registry.file_names(_rules)})


def __getattr__(name: str) -> Callable[..., InnerRule]:
    """Return a rule that another package offers; raise ``AttributeError`` for an unknown name."""
    if name in registry.names(_rules):
        rule: Callable[..., InnerRule] = registry.load(_rules, name)
        return rule
    raise AttributeError(f"no inner rule is called {name!r}: {registry.nearest(name, registry.names(_rules))}")
