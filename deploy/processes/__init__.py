"""The processes that the daemon starts and supervises."""
