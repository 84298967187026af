"""Compare speed and memory with peers: ``make bench`` runs ``python -m tests.benchmarks`` in ``.venv-bench/``."""
