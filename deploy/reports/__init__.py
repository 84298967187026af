"""Reports of a finished run: HTML, JSON and a plot."""
