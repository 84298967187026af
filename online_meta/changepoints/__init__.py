"""Detect where the task changes in a stream without task boundaries."""
