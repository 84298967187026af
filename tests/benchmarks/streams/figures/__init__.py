"""One figure of ``make bench-streams`` a file: ``TITLE``, ``measure(folder)`` and ``judge(samples)``."""
