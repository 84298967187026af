"""Ranks: process groups, the elastic agent, and the statistics of each rank."""
