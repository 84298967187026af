"""Conjugate likelihoods, one per file: log p(sample | samples of its run), without any training.

A file NAME.py defines a function NAME(inputs, outputs, **options) -> ``Likelihood``; the registry finds it by its file
name. Files whose names begin with _ are not entries.

- ``inputs`` is the number of values in x, ``outputs`` the number of classes or of values in y; both are at least 1.
- Each option has a default, and a type of ``Annotated`` with its range (annotated_types); the configuration is checked
  against them. The function raises ``ValueError`` for a value out of range.
- ``start``, ``score`` and ``update`` are pure: they do not write to their arguments. Random features are a function of
  the option ``seed``.
- A stack of n runs is a flat dict of tensors of shape (n, ...), whose size does not grow with the length of the runs.
  Each run of a stack is scored and updated independently of the others.
- ``score`` returns natural logarithms, float64, of shape (n,).
"""
