"""Experiments: tables of the field on the project's own machinery; each entry resumes where it was stopped."""
