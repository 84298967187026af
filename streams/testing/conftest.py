"""Fix the conditions under which every test of this package runs."""

from online_meta.testing.conditions import fixed_conditions

__all__ = ["fixed_conditions"]
