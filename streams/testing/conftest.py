"""What every test of this package runs under."""

from online_meta.testing.conditions import fixed_conditions

__all__ = ["fixed_conditions"]
