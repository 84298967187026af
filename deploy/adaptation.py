"""Answer adaptation requests with the current leader, without disturbing the trainer."""

from pathlib import Path
from threading import Lock
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

from online_meta.functional import ModelLoss
from online_meta.inner import Inner
from online_meta.types import Batch, Meta
from trainers.build import build_inner, build_loss, build_module
from trainers.settings import TrainerSettings


class Leader(NamedTuple):
    """Published meta-parameters, and how many rounds they have learned."""

    meta: Meta
    round: int


def read_leader(path: Path) -> Leader:
    """Read meta-parameters as the trainer publishes them; raises ``FileNotFoundError`` before the first time."""
    if not path.exists():
        raise FileNotFoundError(path)
    with safe_open(path, "pt") as file:
        round = int(file.metadata()["round"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    rule = {name.removeprefix("rule."): value for name, value in tensors.items() if name.startswith("rule.")}
    return Leader(Meta({n: v for n, v in tensors.items() if not n.startswith("rule.")}, rule), round)


def find_leader(path: Path) -> Meta | None:
    """Return the meta-parameters that the trainer has published; None before the first time."""
    return read_leader(path).meta if path.exists() else None


class Adapter:
    """Adapts the newest published leader to support sets; may be called from several threads."""

    def __init__(self, settings: TrainerSettings, leader: Path) -> None:
        """Build the model's skeleton once; the weights come from the file ``leader``."""
        torch.set_num_threads(settings.engine.threads)
        module = build_module(settings.model, settings.seed)
        self._loss: ModelLoss = build_loss(settings.model, module)
        self.inner: Inner = build_inner(settings.inner, self._loss)
        self._path = leader
        self._lock = Lock()
        self._cached: tuple[int, Leader] | None = None

    def leader(self) -> Leader:
        """Return the newest leader; raises ``FileNotFoundError`` when none has been published."""
        with self._lock:
            stamp = self._path.stat().st_mtime_ns
            if self._cached is None or self._cached[0] != stamp:
                self._cached = (stamp, read_leader(self._path))
            return self._cached[1]

    def predict(self, support: Batch, query_x: Tensor) -> tuple[Tensor, int]:
        """Return the adapted model's output on ``query_x`` and the round of the leader it was adapted from."""
        leader = self.leader()
        with torch.no_grad():
            adapted = self.inner.adapt(leader.meta, support)
            return self._loss.output(adapted, query_x), leader.round


def encode_predictions(output: Tensor, classes: bool) -> bytes:
    """Return ``predictions`` (n, ...) as safetensors, and for classification ``labels`` (n,) int64 beside it."""
    tensors = {"predictions": output.detach().cpu().contiguous()}
    if classes:
        tensors["labels"] = output.argmax(-1).cpu().contiguous()
    return save(tensors)


def decode_predictions(body: bytes) -> dict[str, Tensor]:
    """Read what ``encode_predictions`` wrote."""
    return load(body)
