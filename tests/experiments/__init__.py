"""Experiments that reproduce tables of the field with this project; each of them resumes after an interruption."""
