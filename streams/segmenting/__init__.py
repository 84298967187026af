"""Cut streams of samples into tasks: by count, by key, at detected changes, or by the leader's loss."""
