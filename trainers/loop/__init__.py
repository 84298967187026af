"""The training loop: rounds, checkpoints in the background, recovery, prefetching."""
