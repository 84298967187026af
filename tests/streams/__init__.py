"""Where tasks come from and where they are kept."""
