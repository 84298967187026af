"""Speed and memory beside peers: ``make bench``, which is ``python -m tests.benchmarks`` in ``.venv-bench/``."""
