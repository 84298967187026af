"""Answer adaptation requests with the current leader, without disturbing the trainer."""

from pathlib import Path
from threading import Lock
from typing import NamedTuple

import torch
from pydantic import TypeAdapter
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

from deploy.config.config import Config
from deploy.exits import CONFIG, CommandError
from online_meta.functional.model import ModelLoss
from online_meta.inner import Inner
from online_meta.regret.ledger import MAIN_LEARNER
from online_meta.types import Batch, Meta, Task
from streams.history.history import History
from streams.segmenting.by_leader import LeaderContext
from trainers.build import build_inner, build_loss, build_module
from trainers.checkpoint import MANIFEST, Checkpoint, CheckpointError, list_checkpoints, load_checkpoint
from trainers.journal.run_files import RunFiles
from trainers.loop.task_prefetch import HistoryBuffer
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


def leader_of(config: Config, files: RunFiles, history: History | None) -> LeaderContext:
    """Return the leader as it is published, before that the one that the run begins with; None: no rounds yet."""
    settings = config.trainer()
    adapter = Adapter(settings, files.leader)
    start = adapter.inner.init(dict(build_module(settings.model, settings.seed).named_parameters()))
    buffer = HistoryBuffer(history, torch.device("cpu"))

    def latest_leader() -> tuple[Meta, int]:
        return adapter.leader() if files.leader.exists() else (start, 0)

    def count_rounds() -> int:
        return 0 if history is None else len(history)

    def latest_tasks(count: int) -> list[Task]:
        return [] if history is None else history.tasks(buffer.available(len(history))[-count:])

    return LeaderContext(adapter.inner, config.model.loss == "mse", latest_leader, count_rounds, latest_tasks)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint; raises ``CommandError`` (78) that says which ones there are when ``folder`` holds several."""
    rounds = list_checkpoints(folder)
    if rounds and not (folder / MANIFEST).exists():
        choices = ", ".join(str(folder / str(round)) for round in rounds)
        raise CommandError(CONFIG, f"{folder} holds several checkpoints: give one of {choices}")
    try:
        return load_checkpoint(folder)
    except CheckpointError as error:
        raise CommandError(CONFIG, str(error)) from error


def adapt_from_checkpoint(folder: Path, support: Batch, query_x: Tensor) -> tuple[Tensor, bool]:
    """Return the output of the checkpoint's leader, adapted to ``support``, on ``query_x``, and whether it classifies.

    Raises ``CommandError`` (78) for a checkpoint that cannot be read, or tensors that its model does not take.
    """
    checkpoint = open_checkpoint(folder)
    settings = TypeAdapter(TrainerSettings).validate_python(checkpoint.settings)
    torch.set_num_threads(settings.engine.threads)
    try:
        loss = build_loss(settings.model, build_module(settings.model, settings.seed))
        inner = build_inner(settings.inner, loss)
    except ValueError as error:
        raise CommandError(CONFIG, f"the model of {folder} cannot be built here: {error}") from error
    saved = checkpoint.learners[MAIN_LEARNER]
    meta = Meta(
        {name.removeprefix("weights."): value for name, value in saved.items() if name.startswith("weights.")},
        {name.removeprefix("rule."): value for name, value in saved.items() if name.startswith("rule.")},
    )
    try:
        with torch.no_grad():
            return loss.output(inner.adapt(meta, support), query_x), settings.model.loss == "cross_entropy"
    except (RuntimeError, ValueError, IndexError) as error:
        raise CommandError(CONFIG, f"the model of {folder} does not take these tensors: {error}") from error
