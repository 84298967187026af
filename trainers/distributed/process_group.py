"""Join the process group of a run from the agent's environment variables; without them, make a group of one process."""

import json
import os
import socket
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from online_meta.types import Params
from trainers.distributed.ranks import SINGLE_PROCESS, PayloadsByRank, RankGroup
from trainers.distributed.rendezvous import STORE_VARIABLE, open_store, split_address
from trainers.settings import EngineSettings

TIMEOUT_MIN_ROUNDS = 30


TIMEOUT_MAX_ROUNDS = 1000


TIMEOUT_SLACK_SECONDS = 5.0


class AdaptiveTimeout:
    """A time-out for silent ranks that adapts to the duration of rounds.

    It is ``limit`` at first. After ``TIMEOUT_MIN_ROUNDS`` rounds it is three times the longest of the last
    ``TIMEOUT_MAX_ROUNDS`` rounds plus ``TIMEOUT_SLACK_SECONDS``, but at most ``limit``.

    Args:
        limit: largest time-out, in seconds.
    """

    def __init__(self, limit: float) -> None:
        """Start without observed rounds."""
        self._limit = limit
        self._round_seconds: deque[float] = deque(maxlen=TIMEOUT_MAX_ROUNDS)

    def observe(self, seconds: float) -> None:
        """Record the duration of a round."""
        self._round_seconds.append(seconds)

    def is_ready(self) -> bool:
        """Return whether enough rounds are observed to adapt the time-out."""
        return len(self._round_seconds) >= TIMEOUT_MIN_ROUNDS

    def seconds(self) -> float:
        """Return the time-out for a silent rank, in seconds."""
        return (
            min(self._limit, 3 * max(self._round_seconds) + TIMEOUT_SLACK_SECONDS) if self.is_ready() else self._limit
        )


def read_own_rank() -> int | None:
    """Return this process's rank from the agent's environment; None if no agent started it."""
    return int(os.environ["RANK"]) if "RANK" in os.environ else None


@contextmanager
def join_process_group(settings: EngineSettings, has_storage: bool = True) -> Iterator[RankGroup]:
    """Join the process group during the block and yield its ranks.

    A collective that the other ranks do not join within ``settings.timeout_seconds`` raises ``RuntimeError``, so that
    a hanging rank does not hang the others.

    Args:
        settings: [engine] section of the configuration.
        has_storage: whether this process can access the run's files; the first rank that can is the coordinator.

    Raises:
        ValueError: if only some of the agent's variables are set, or no rank can access the run's files.
    """
    variables = [name for name in ("RANK", "WORLD_SIZE", STORE_VARIABLE) if name in os.environ]
    if variables and len(variables) < 3:
        raise ValueError(
            f"the environment has only {', '.join(variables)}: the ranks of a run are started by `online-meta serve` "
            "and, on other machines, by `python -m deploy.processes.join CONFIG.toml`, not by torchrun"
        )
    on_gpu = settings.device.startswith("cuda")
    # DeepSpeed requires the first. Without the second it calls numactl in each step; without the third it guesses.
    local_rank = os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_gpu else "cpu")
    if on_gpu:
        torch.cuda.set_device(int(local_rank))
    _restrict_interfaces(settings)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        timeout=timedelta(seconds=settings.timeout_seconds),
        world_size=int(os.environ["WORLD_SIZE"]) if variables else 1,
        rank=int(os.environ["RANK"]) if variables else 0,
        store=open_store(os.environ[STORE_VARIABLE], settings.timeout_seconds) if variables else HashStore(),
    )
    try:
        rank_group = _make_rank_group(has_storage)
        yield rank_group if rank_group.world > 1 else SINGLE_PROCESS
    finally:
        dist.destroy_process_group()


def _restrict_interfaces(settings: EngineSettings) -> None:
    """Let gloo and NCCL listen on one interface only.

    On one machine it is the loopback interface. With several machines it is the interface towards the rendezvous,
    unless the user has named another one.
    """
    os.environ.setdefault("NCCL_RAS_ENABLE", "0")  # NCCL would listen for a monitoring tool.
    if settings.nodes[1] == 1:
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = (
            "lo0" if sys.platform == "darwin" else "lo"
        )
        return
    if interface := _find_interface(*split_address(settings.rendezvous)):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)


def _find_interface(host: str, port: int) -> str | None:
    """Return the network interface whose address this machine uses towards ``host``, which may be its own."""
    import psutil  # It belongs to the extra `deepspeed`.

    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # Sends nothing: it only chooses the address.
        own = probe.getsockname()[0].partition("%")[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == own for one in addresses):
            return name
    return None


def _make_rank_group(has_storage: bool) -> RankGroup:
    """Return the group of ranks, after they have exchanged which of them can access the run's files."""
    world = dist.get_world_size()
    seen = [torch.empty(1, dtype=torch.int64) for _ in range(world)]
    dist.all_gather(seen, torch.tensor([int(has_storage)]))
    with_storage = tuple(rank for rank in range(world) if seen[rank])
    if not with_storage:
        raise ValueError("no rank was started by `online-meta serve`, whose machine has the run's files")
    coordinator = with_storage[0]
    remote = [rank for rank in range(world) if rank not in with_storage]
    return RankGroup(
        dist.get_rank(),
        world,
        with_storage,
        partial(_broadcast_json, coordinator),
        partial(_broadcast_tensors, coordinator),
        partial(_send, coordinator, remote),
        set_timeouts,
        _gather,
    )


def _broadcast_json(coordinator: int, value: Any) -> Any:
    """Return on every rank the JSON value that the coordinator passed."""
    return json.loads(_broadcast_bytes(coordinator, json.dumps(value).encode()))


def _broadcast_tensors(coordinator: int, tensors: Params | None) -> Params:
    """Return on every rank the tensors that the coordinator passed, with one broadcast per tensor."""
    own = {name: value.cpu().contiguous() for name, value in (tensors or {}).items()}
    headers = _broadcast_json(coordinator, [[name, str(value.dtype), list(value.shape)] for name, value in own.items()])
    shared = {}
    for name, dtype, shape in headers:
        value = own[name] if own else torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
        dist.broadcast(value, coordinator)
        shared[name] = value
    return shared


def _send(coordinator: int, remote: Sequence[int], payloads: PayloadsByRank | None) -> list[bytes]:
    """Send payloads from the coordinator to each of the ``remote`` ranks; return there what was received."""
    if payloads is None:
        sizes = torch.empty(2, dtype=torch.int64)
        dist.recv(sizes, coordinator)
        body = torch.empty(int(sizes.sum()), dtype=torch.uint8)
        dist.recv(body, coordinator)
        head, content = body[: sizes[0]].numpy().tobytes(), body[sizes[0] :].numpy().tobytes()
        ends = list(accumulate(json.loads(head), initial=0))
        return [content[first:last] for first, last in pairwise(ends)]
    for rank in remote:
        head, content = json.dumps([len(body) for body in payloads[rank]]).encode(), b"".join(payloads[rank])
        dist.send(torch.tensor([len(head), len(content)]), rank)
        dist.send(_to_byte_tensor(head + content), rank)
    return []


def _gather(value: Any) -> list[Any]:
    """Return on every rank the JSON values that all ranks passed, in the order of ranks."""
    body = json.dumps(value).encode()
    sizes = [torch.empty(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(body)]))
    max_size = int(max(sizes))
    bodies = [torch.empty(max_size, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(bodies, _to_byte_tensor(body.ljust(max_size)))  # JSON allows trailing spaces.
    return [json.loads(one.numpy().tobytes()) for one in bodies]


def _broadcast_bytes(coordinator: int, body: bytes) -> bytes:
    size = torch.tensor([len(body)])
    dist.broadcast(size, coordinator)
    buffer = _to_byte_tensor(body) if dist.get_rank() == coordinator else torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(buffer, coordinator)
    return buffer.numpy().tobytes()


def _to_byte_tensor(body: bytes) -> Tensor:
    return torch.frombuffer(bytearray(body), dtype=torch.uint8)


def set_timeouts(timeout_seconds: float) -> None:
    """Set the time-out, in seconds, of every process group; groups made by DeepSpeed do not inherit it."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_seconds), group)
