"""The figures of ``make bench-streams``; each module has ``TITLE``, ``measure(folder)``, ``make_figures(samples)``."""
