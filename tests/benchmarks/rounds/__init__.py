"""Whole rounds of the system, next to the same game in plain JAX. Run by ``python -m tests.benchmarks.rounds``."""
