"""How likely a sample is, given those of its run, by conjugate models that need no training, one a file."""
