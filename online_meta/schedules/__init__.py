"""Learning-rate schedules of the outer loop, one a file: each gives, round by round, a share of ``meta.lr``."""
