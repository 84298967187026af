"""Reports of a run: HTML, JSON and a plot."""
