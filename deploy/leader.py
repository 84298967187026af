"""Adapt the published meta-parameters (the meta-leader) to support sets, outside the trainer process."""

from collections.abc import Iterator
from contextlib import contextmanager
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
from online_meta.batching.failures import describe_failure
from online_meta.functional.model import ModelLoss
from online_meta.inner import Inner
from online_meta.types import Batch, Meta, Task
from streams.history.history import History
from streams.segmenting.by_leader import LeaderContext
from streams.types import Rejected
from trainers.build import build_inner, build_loss, build_module
from trainers.checkpoint import MANIFEST, Checkpoint, CheckpointError, list_checkpoints, load_checkpoint
from trainers.journal.run_files import RunFiles
from trainers.loop.task_prefetch import HistoryBuffer
from trainers.settings import TrainerSettings


class Leader(NamedTuple):
    """Published meta-parameters and the number of rounds that they have learned."""

    meta: Meta
    round: int


def read_leader(path: Path) -> Leader:
    """Read the meta-parameters from the file that the trainer publishes.

    Raises:
        FileNotFoundError: if none have been published yet.
    """
    if not path.exists():
        raise FileNotFoundError(path)
    with safe_open(path, "pt") as file:
        round = int(file.metadata()["round"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    rule = {name.removeprefix("rule."): value for name, value in tensors.items() if name.startswith("rule.")}
    return Leader(Meta({n: v for n, v in tensors.items() if not n.startswith("rule.")}, rule), round)


def find_leader(path: Path) -> Meta | None:
    """Return the meta-parameters that the trainer has published; None if there are none yet."""
    return read_leader(path).meta if path.exists() else None


class Adapter:
    """An adapter of the newest published leader to support sets; it is thread-safe.

    Args:
        settings: of the run.
        leader: file in which the trainer publishes the meta-parameters.
    """

    def __init__(self, settings: TrainerSettings, leader: Path) -> None:
        """Build the model and the inner loop once; each call reads the weights from the file if it has changed."""
        torch.set_num_threads(settings.engine.threads)
        module = build_module(settings.model, settings.seed)
        self._loss: ModelLoss = build_loss(settings.model, module)
        self.inner: Inner = build_inner(settings.inner, self._loss)
        self._path = leader
        self._lock = Lock()
        self._cached: tuple[int, Leader] | None = None

    def leader(self) -> Leader:
        """Return the newest leader; raises ``FileNotFoundError`` if none has been published."""
        with self._lock:
            stamp = self._path.stat().st_mtime_ns
            if self._cached is None or self._cached[0] != stamp:
                self._cached = (stamp, read_leader(self._path))
            return self._cached[1]

    def predict(self, support: Batch, query_x: Tensor) -> tuple[Tensor, int]:
        """Adapt the newest leader to a support set.

        Args:
            support: x (n, ...) and y (n, ...).
            query_x: inputs to predict, (m, ...).

        Returns:
            The adapted model's output (m, ...), and the number of rounds that the leader has learned.

        Raises:
            FileNotFoundError: if no leader has been published.
            Rejected: with the reason "model_error", if the model raises an exception.
        """
        leader = self.leader()
        with model_error_context(), torch.no_grad():
            adapted = self.inner.adapt(leader.meta, support)
            return self._loss.output(adapted, query_x), leader.round

    def answer(self, support: Batch, query_x: Tensor, classes: bool) -> tuple[bytes, int]:
        """Return ``encode_predictions`` of what ``predict`` returns, and the leader's rounds; raises as it does."""
        output, round = self.predict(support, query_x)
        with model_error_context():
            return encode_predictions(output, classes), round


@contextmanager
def model_error_context() -> Iterator[None]:
    """Raise ``Rejected`` with the reason "model_error" for every exception of a user's model or loss."""
    try:
        yield
    except BaseException as error:  # a SystemExit would end the daemon
        detail = f"the model does not accept the support or query set: {describe_failure(error)}"
        raise Rejected("model_error", detail) from error


def encode_predictions(output: Tensor, classes: bool) -> bytes:
    """Return safetensors bytes with ``predictions`` (n, ...) and, if ``classes``, ``labels`` (n,) int64.

    Labels are the argmax over the last dimension of the predictions.
    """
    tensors = {"predictions": output.detach().cpu().contiguous()}
    if classes:
        tensors["labels"] = output.argmax(-1).cpu().contiguous()
    return save(tensors)


def decode_predictions(body: bytes) -> dict[str, Tensor]:
    """Return the tensors that ``encode_predictions`` has encoded."""
    return load(body)


def leader_of(config: Config, files: RunFiles, history: History | None) -> LeaderContext:
    """Return the context with which sources segment a stream by the leader's loss.

    Its leader is the newest published one, or the initial meta-parameters before the first publication.

    Args:
        config: of the run.
        files: of the run.
        history: from which the latest tasks are read; None if the run has no rounds yet.
    """
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
    """Read the checkpoint in ``folder``.

    Raises:
        CommandError: with exit code 78 if the checkpoint cannot be read, or if ``folder`` contains several checkpoints,
            which the message lists.
    """
    rounds = list_checkpoints(folder)
    if rounds and not (folder / MANIFEST).exists():
        choices = ", ".join(str(folder / str(round)) for round in rounds)
        raise CommandError(CONFIG, f"{folder} contains several checkpoints: choose one of {choices}")
    try:
        return load_checkpoint(folder)
    except CheckpointError as error:
        raise CommandError(CONFIG, str(error)) from error


def adapt_from_checkpoint(folder: Path, support: Batch, query_x: Tensor) -> tuple[Tensor, bool]:
    """Adapt the meta-parameters of a checkpoint to a support set and predict.

    Args:
        folder: of the checkpoint.
        support: x (n, ...) and y (n, ...).
        query_x: inputs to predict, (m, ...).

    Returns:
        The adapted model's output (m, ...), and whether the model is a classifier.

    Raises:
        CommandError: with exit code 78 if the checkpoint cannot be read, its model cannot be built, or the model does
            not accept the tensors.
    """
    checkpoint = open_checkpoint(folder)
    settings = TypeAdapter(TrainerSettings).validate_python(checkpoint.settings)
    torch.set_num_threads(settings.engine.threads)
    try:
        loss = build_loss(settings.model, build_module(settings.model, settings.seed))
        inner = build_inner(settings.inner, loss)
    except ValueError as error:
        raise CommandError(CONFIG, f"the model of {folder} cannot be built here: {error}") from error
    saved = checkpoint.learners[checkpoint.leader]
    meta = Meta(
        {name.removeprefix("weights."): value for name, value in saved.items() if name.startswith("weights.")},
        {name.removeprefix("rule."): value for name, value in saved.items() if name.startswith("rule.")},
    )
    try:
        with torch.no_grad():
            return loss.output(inner.adapt(meta, support), query_x), settings.model.loss == "cross_entropy"
    except Exception as error:  # a user's model may raise anything
        detail = describe_failure(error)
        raise CommandError(CONFIG, f"the model of {folder} does not accept these tensors: {detail}") from error
