"""Checks before a run starts: the model, memory, the run's folder."""
