"""Ranks: process groups, the elastic agent, and what each rank measures."""
