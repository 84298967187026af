"""Take tasks in: decode, validate, commit in groups, and keep what is refused."""
