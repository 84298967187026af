"""Engines: who holds the meta-parameters and steps them, one kind a file."""
