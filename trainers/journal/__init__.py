"""The files that a run writes: round records, update plans, rollbacks, the published leader."""
