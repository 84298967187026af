"""Replay policies: which past rounds a meta-step revisits, one a file."""
