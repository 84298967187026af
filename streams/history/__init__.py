"""Store the durable history of tasks: the ledger, the archive, retention, verification and repair."""
