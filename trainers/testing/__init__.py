"""The contracts of engines and comparators, as tests: ``pytest --pyargs trainers.testing``; ``-k NAME`` chooses one."""
