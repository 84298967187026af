"""The package's own meter, under the name that tests know."""

from online_meta.memory import MemoryMeter, bytes_of

__all__ = ["MemoryMeter", "bytes_of"]
