"""Changepoint detectors, one per file: find where the task changes in an unsegmented stream of samples.

A file NAME.py defines a function NAME(likelihood, **options) -> ``Segmenter``; the registry finds it by its file name.
Files whose names begin with _ are not entries.

- ``likelihood`` is a ``Likelihood``: log p(next sample | samples of the current run).
- Each option has a default, and a type of ``Annotated`` with its range (annotated_types); the configuration is checked
  against them. The function raises ``ValueError`` for a value out of range.
- ``start``, ``update`` and ``change`` are pure: they do not write to their arguments, and they draw no random numbers.
- The memory is a flat dict of tensors whose size has a bound that does not depend on the number of samples.
- ``change`` returns a number of samples from 1 to those seen minus 1, or None. The samples after a change alone
  determine what is found after it, so that segmenting can restart at any change.
"""
