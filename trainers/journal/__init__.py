"""The files that a run writes: round records, update plans, execution plans, rollbacks, the published leader."""
