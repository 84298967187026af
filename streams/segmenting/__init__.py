"""Cut streams of samples into tasks: by length, by changes, or by the leader's loss."""
