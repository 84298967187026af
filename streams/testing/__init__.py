"""Test the contract of sources: ``pytest --pyargs streams.testing``; ``-k NAME`` selects one source."""
