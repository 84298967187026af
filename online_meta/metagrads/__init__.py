"""Meta-gradient estimators, one per file: estimate d(query loss after adaptation) / d(meta-parameters) on one task.

A file NAME.py defines a function NAME(inner, **options) -> ``MetaGradient``; the registry finds it by its file name.
Files whose names begin with _ are not entries.

- ``inner`` is an ``Inner``: model loss, inner rule, number of steps and the weights that adapt.
- All options are keyword-only with defaults. The function raises ``ValueError`` for options out of range, and for an
  inner loop that the estimator cannot differentiate.
- The estimator maps (meta, task) to a ``MetaGrad``: the query loss, a scalar, and gradients with the names, shapes,
  dtypes and order of ``meta``. They are detached. An optimizer subtracts them.
- It is a pure function: the same arguments give the same bits, and it does not write to them.
- It works under ``torch.func.vmap`` over stacked tasks if the loss and the rule do and draw no random numbers. Options
  that prevent this raise ``RuntimeError`` there.
- Support and query sets may have a single sample.
"""
