"""Tests of where tasks come from and where they are kept."""
