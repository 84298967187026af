"""The contract of metrics, as tests: ``pytest --pyargs deploy.testing``; ``-k NAME`` chooses one."""
