"""Where compiled programs are shared, unless the configuration says it."""

import os
from dataclasses import replace
from pathlib import Path

from deploy.config.config import Config


def share_programs(config: Config) -> Config:
    """Return a configuration with the user's cache of compiled programs, unless it names one or none."""
    if config.engine.programs is not None:
        return config
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        caches = Path(given) if Path(given).is_absolute() else Path.home() / ".cache"
    except RuntimeError:  # The user has no home.
        return config
    return replace(config, engine=replace(config.engine, programs=str(caches / "online-meta" / "programs")))
