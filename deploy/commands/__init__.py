"""The commands of `online-meta`, one a file."""
