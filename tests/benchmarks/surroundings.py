"""Describe the machine and the software of a benchmark."""

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click

PACKAGES = ("torch", "jax", "jaxlib", "higher", "torchopt", "numpy")


def describe_machine() -> dict[str, Any]:
    """Return the processor, the system and its load."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": f"{models[0] if models else platform.processor() or 'unknown processor'}, {os.cpu_count()} cores",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "load_before": os.getloadavg()[0],
    }


def read_versions() -> dict[str, str]:
    """Return the versions of the package and its peers."""
    return {name: _read_version(name) for name in PACKAGES}


def read_commit() -> str:
    """Return the commit, marked if files differ from it."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def log_progress(what: str) -> None:
    """Say on stderr what is measured now, with the time of day."""
    click.echo(f"{time.strftime('%H:%M:%S')} {what}", err=True)


def bind_to_one_core() -> None:
    """Bind this process and its children to one core if possible, because XLA otherwise uses one thread per core."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def _read_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "is missing"
