"""The training loop: rounds, background checkpoints, recovery, task prefetching."""
