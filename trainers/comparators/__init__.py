"""What a run is compared with: comparators, one a file, each with a ``refresh``; see ``trainers/comparing.py``."""
