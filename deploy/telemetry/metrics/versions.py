"""Versions of what runs."""

import torch

import online_meta
from deploy.telemetry.metrics import Instruments, Metric

METRICS = (Metric("online_meta_info", "gauge", "Always 1; what runs, in its labels.", ("version", "torch", "engine")),)


def start(instruments: Instruments, engine: str) -> None:
    """Set the labels."""
    instruments["info"].labels(version=online_meta.__version__, torch=torch.__version__, engine=engine).set(1)
