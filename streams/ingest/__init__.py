"""Ingest tasks: decode, validate and commit them in groups, and keep rejected ones as dead letters."""
