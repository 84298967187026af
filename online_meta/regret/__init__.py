"""Score tasks before they are learned, keep the regret ledger, and compute closed-form comparators."""
