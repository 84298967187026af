"""Join the other ranks of a run, as torchrun's environment tells; without one, a world of this process alone."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from trainers.crew import ALONE, Crew
from trainers.settings import EngineSettings


@contextmanager
def joined(settings: EngineSettings) -> Iterator[Crew]:
    """Be a member of the process group for the time of the block; yields the crew of its ranks.

    Collectives that the others do not join within ``settings.timeout_seconds`` raise ``RuntimeError``: a rank that
    hangs must not hang the others. Raises ``ValueError`` when torchrun's variables are there in part only.
    """
    told = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name in os.environ]
    if told and len(told) < 4:
        raise ValueError(f"the environment has {', '.join(told)} alone: start the ranks by torchrun")
    on_gpu = settings.device.startswith("cuda")
    # DeepSpeed insists on the first; without the second it asks numactl in each step, without the third it guesses.
    local_rank = os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_gpu else "cpu")
    if on_gpu:
        torch.cuda.set_device(int(local_rank))
    store, rank, world = (None, -1, -1) if told else (dist.HashStore(), 0, 1)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        timeout=timedelta(seconds=settings.timeout_seconds),
        world_size=world,
        rank=rank,
        store=store,
    )
    try:
        yield Crew(dist.get_rank(), dist.get_world_size(), share_json) if dist.get_world_size() > 1 else ALONE
    finally:
        dist.destroy_process_group()


def share_json(value: Any) -> Any:
    """Return on every rank what rank 0 called this with; it has to be JSON."""
    body = json.dumps(value).encode() if dist.get_rank() == 0 else b""
    size = torch.tensor([len(body)])
    dist.broadcast(size, 0)
    buffer = torch.frombuffer(bytearray(body), dtype=torch.uint8) if body else torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(buffer, 0)
    return json.loads(buffer.numpy().tobytes())


def set_timeouts(timeout_seconds: float) -> None:
    """Set the time-out of every group there is: those that DeepSpeed makes have none of ours."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_seconds), group)
