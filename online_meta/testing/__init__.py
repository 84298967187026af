"""The contracts of the registries of ``online_meta``, as tests: ``pytest --pyargs online_meta.testing``.

They run for every rule, estimator, replay policy, schedule, learner, detector and likelihood, those that other packages
offer through entry points included; ``-k NAME`` chooses one.
"""
