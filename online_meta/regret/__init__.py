"""Scores, the regret ledger, and closed-form comparators."""
