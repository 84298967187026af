"""Meta-gradient estimators, one a file: each makes a ``MetaGradient`` of an ``Inner``."""
