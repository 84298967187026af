"""The commands of `online-meta`, one per file.

A file ``NAME.py`` defines the click command ``command``; underscores in the name become hyphens on the command line.
"""
