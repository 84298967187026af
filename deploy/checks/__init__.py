"""Checks before a run starts: configuration, model, memory, the run's folder."""
