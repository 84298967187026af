"""Online learners: Follow-the-Meta-Leader and the baselines that run beside it, one a file."""
