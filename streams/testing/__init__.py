"""The contract of sources, as tests: ``pytest --pyargs streams.testing``; ``-k NAME`` chooses one."""
