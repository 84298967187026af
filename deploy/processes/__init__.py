"""The daemon's child processes (trainer, comparators, maintenance) and their supervision."""
