"""The package's memory meter, re-exported for tests."""

from online_meta.memory import MemoryMeter, bytes_of

__all__ = ["MemoryMeter", "bytes_of"]
