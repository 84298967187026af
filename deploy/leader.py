"""Answer from what a run publishes, outside the trainer process: adapt to support sets and predict."""

import json
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Lock, Thread
from typing import NamedTuple
from weakref import ref

import torch
from pydantic import TypeAdapter
from safetensors import safe_open
from torch import Tensor

from deploy.config.config import Config
from deploy.exits import CONFIG, CommandError
from deploy.predictions import PLAIN, AnswerFormat, encode_predictions
from online_meta.answers import names_of, pack_meta, unpack_meta
from online_meta.batching.failures import describe_failure
from online_meta.learners import BelievingLearner, MemoryReplayBuffer
from online_meta.learners.pool import Pool, select_state
from online_meta.regret.ledger import MAIN_LEARNER
from online_meta.tree import copy_aligned
from online_meta.types import Batch, Belief, Meta, Prediction, State, Task, Tensors
from streams.history.history import History
from streams.segmenting.by_leader import LeaderContext
from streams.types import Rejected
from trainers.build import AnsweringLearner, build_answering_learner
from trainers.checkpoint import MANIFEST, Checkpoint, CheckpointError, list_checkpoints, load_checkpoint
from trainers.journal.leader_file import DECISIONS, RANGES
from trainers.journal.run_files import RunFiles
from trainers.journal.tuning_log import read_decision
from trainers.learner_settings import POOL, Decision, obey_decisions
from trainers.loop.task_prefetch import HistoryBuffer
from trainers.seen_inputs import SEEN, Ranges, decode_ranges, find_outside
from trainers.settings import TrainerSettings

FOLLOW_SECONDS = 0.2
"""How long a thread waits before it looks for a new leader."""

log = logging.getLogger(__name__)


class Leader(NamedTuple):
    """What a run has published: the ``state`` of the ``learner`` that answers, after ``round`` learned rounds.

    ``leads`` is the name of the learner that leads, whose state a pool publishes, too. ``decisions`` are those of the
    run's race that hold, and ``ranges`` those of the inputs of its rounds, {} if they are not known.
    """

    state: State
    round: int
    learner: str = MAIN_LEARNER
    leads: str = MAIN_LEARNER
    decisions: tuple[Decision, ...] = ()
    ranges: Ranges = {}  # noqa: RUF012 - it is never changed

    @property
    def meta(self) -> Meta:
        """The meta-parameters, of a learner that answers from one set of them, or of the pool's leading one."""
        return unpack_meta(self.without_pool().state)

    def without_pool(self) -> "Leader":
        """Return the leading learner's part of what a pool has published; of another learner, all of it."""
        if self.learner != POOL:
            return self
        return Leader(select_state(self.state, self.leads), self.round, self.leads, self.leads)


class Answer(NamedTuple):
    """The answer to a support set.

    Attributes:
        prediction: of the query rows.
        round: the number of rounds that the leader has learned.
        outside: which query rows lie outside of the inputs that the run has seen, (n,) of bool.
    """

    prediction: Prediction
    round: int
    outside: Tensor


def read_leader(path: Path) -> Leader:
    """Read what the trainer publishes from its file.

    Raises:
        FileNotFoundError: if nothing has been published yet.
    """
    if not path.exists():
        raise FileNotFoundError(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = copy_aligned({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - not a mapping
    learner = metadata.get("learner", MAIN_LEARNER)
    decisions = tuple(read_decision(line) for line in json.loads(metadata.get(DECISIONS, "[]")))
    ranges = decode_ranges(metadata.get(RANGES, ""))
    return Leader(tensors, int(metadata["round"]), learner, metadata.get("leads", learner), decisions, ranges)


def find_leader(path: Path, like: Meta) -> Meta | None:
    """Return the meta-parameters that the trainer has published; of a pool, those of the learner that leads.

    Returns None if there are none yet, or if the learner does not answer from parameters like ``like``.
    """
    if not path.exists():
        return None
    state, wanted = read_leader(path).without_pool().state, pack_meta(like)
    fits = {name: value.shape for name, value in state.items()} == {n: value.shape for n, value in wanted.items()}
    return unpack_meta(state, names_of(like)) if fits else None


class Adapter:
    """An adapter of the newest published leader to support sets; it is thread-safe.

    Args:
        settings: of the run.
        leader: file in which the trainer publishes what the run answers from.
        executor: whose one thread records answers as programs, which have the same bits and save most of the time of
            small models; see ``AnsweringLearner.record``. By default, no answers are recorded.
    """

    def __init__(self, settings: TrainerSettings, leader: Path, *, executor: Executor | None = None) -> None:
        """Build the learner once; each call reads its state from the file if it has changed.

        If answers share work that depends on the state alone, such as a fit to past rows, a thread reads the file and
        does this work. Until it is done, the leader before it answers; only the first one is waited for.
        """
        torch.set_num_threads(settings.engine.threads)
        self._settings, self._path, self._executor = settings, leader, executor
        self.answering = self._build(settings)
        self._lock = Lock()
        self._cached: tuple[int, Leader, AnsweringLearner] | None = None
        self._decisions: tuple[Decision, ...] = ()
        self._prepare: Callable[[State], None] | None = getattr(self.answering.learner, "prepare", None)
        if self._prepare is not None:
            Thread(target=_follow_leader, args=(ref(self),), name="follow-leader", daemon=True).start()

    def _build(self, settings: TrainerSettings) -> AnsweringLearner:
        answering = build_answering_learner(settings, MemoryReplayBuffer())
        return answering if self._executor is None else answering.record(self._executor)

    def leader(self) -> Leader:
        """Return the newest leader; ``answering`` is then the learner that answers from it.

        Raises ``FileNotFoundError`` if the learner that answers has published none: after a restart with another one,
        the file has what the old one answered from.
        """
        return self._read()[1]

    def _read(self) -> tuple[AnsweringLearner, Leader]:
        """Return the leader to answer from, with the learner that answers."""
        cached = self._cached
        if cached is None or self._prepare is None:
            self.read_newest()
            cached = self._cached
        assert cached is not None
        _, found, answering = cached
        if found.learner != answering.name:
            raise FileNotFoundError(f"{self._path} is published by {found.learner}, not by {answering.name}")
        return answering, found

    def read_newest(self) -> Leader:
        """Return the leader that is in the file now, and prepare for answers from it.

        Raises ``FileNotFoundError`` if nothing has been published yet.
        """
        with self._lock:
            stamp = self._path.stat().st_mtime_ns
            if self._cached is None or self._cached[0] != stamp:
                newest = read_leader(self._path)
                if newest.decisions != self._decisions:  # A race has changed who plays.
                    settings = obey_decisions(self._settings, newest.decisions)
                    self.answering = self._build(settings)
                    self._prepare, self._decisions = getattr(self.answering.learner, "prepare", None), newest.decisions
                if self._prepare is not None and newest.learner == self.answering.name:
                    self._prepare(newest.state)
                self._cached = (stamp, newest, self.answering)
            return self._cached[1]

    def predict(self, support: Batch, query_x: Tensors, samples: int | None = None) -> Answer:
        """Answer to a support set from what is published, by the function that scores the rounds.

        Args:
            support: x (n, ...) and y (n, ...).
            query_x: inputs to predict, (m, ...).
            samples: of a belief; None for the run's number.

        Raises:
            FileNotFoundError: if no leader has been published.
            Rejected: with the reason "model_error", if the model raises an exception, and "fixed_samples", if the
                learner that answers has a fixed number of samples.
        """
        answering, leader = self._read()
        with model_error_context():
            prediction = answering.answer(leader.state, support, query_x, samples)
            return Answer(prediction, leader.round, find_outside(leader.ranges, query_x))

    def answer(self, support: Batch, query_x: Tensors, format: AnswerFormat = PLAIN) -> tuple[bytes, int]:
        """Return ``encode_predictions`` of what ``predict`` returns, and the leader's rounds; raises as both do."""
        prediction, round, outside = self.predict(support, query_x, format.samples)
        with model_error_context():
            return encode_predictions(prediction, format, outside), round


def _follow_leader(adapter: "ref[Adapter]") -> None:
    """Let an adapter read each new leader, as long as there is the adapter."""
    pause = Event()
    while (found := adapter()) is not None:
        try:
            found.read_newest()
        except FileNotFoundError:
            pass
        except Exception:  # A request meets the same error, and answers with it.
            log.exception("the published leader cannot be prepared")
            pause.wait(FOLLOW_SECONDS * 20)
        del found
        pause.wait(FOLLOW_SECONDS)


@contextmanager
def model_error_context() -> Iterator[None]:
    """Raise ``Rejected`` with the reason "model_error" for every exception of a user's model or loss."""
    try:
        yield
    except Rejected:
        raise
    except BaseException as error:  # a SystemExit would end the daemon
        detail = f"the model does not accept the support or query set: {describe_failure(error)}"
        raise Rejected("model_error", detail) from error


def leader_of(config: Config, files: RunFiles, history: History | None) -> LeaderContext:
    """Return the context with which sources segment a stream by the leader's loss.

    Its leader is the newest published one, or the initial meta-parameters before the first publication. Where a pool
    answers, it is the learner that leads.

    Args:
        config: of the run.
        files: of the run.
        history: from which the latest tasks are read; None if the run has no rounds yet.

    Raises:
        ValueError: if the learner that answers does not believe in parameters.
    """
    adapter = Adapter(config.trainer(), files.leader)
    name, learner = _find_leading(adapter.answering)[:2]
    start = learner.state()
    layout = {name: value.shape for name, value in start.items()}
    buffer = HistoryBuffer(history, torch.device("cpu"))

    def latest_leader() -> tuple[State, int]:
        with suppress(FileNotFoundError):
            leader = adapter.leader().without_pool()
            # A fork that is promoted meanwhile may publish another model; the next start follows it.
            if {name: value.shape for name, value in leader.state.items()} == layout:
                return leader.state, leader.round
        return start, 0

    def count_rounds() -> int:
        return 0 if history is None else len(history)

    def latest_tasks(count: int) -> list[Task]:
        return [] if history is None else history.tasks(buffer.available(len(history))[-count:])

    if not isinstance(learner, BelievingLearner):
        raise ValueError(
            f"likelihood = 'leader' needs a learner that answers by parameters of the model, and {name!r} does not: "
            "name another one in [serve] answers"
        )

    def believe(state: State, support: Batch) -> Belief:
        _, found, suffix, _ = _find_leading(adapter.answering)  # A race can change the learner.
        assert isinstance(found, BelievingLearner)
        return found.believe(state, support)[suffix]

    def answers(state: State, support: Batch, x: Tensors) -> dict[str, Prediction]:
        return {"": _find_leading(adapter.answering).answer(state, support, x)}

    squared = config.model.loss == "mse"
    return LeaderContext(answers, believe, learner.inner.loss, squared, latest_leader, count_rounds, latest_tasks)


def _find_leading(answering: AnsweringLearner) -> AnsweringLearner:
    """Return the learner that leads if a pool answers, or else the one that answers."""
    if not isinstance(answering.learner, Pool):
        return answering
    name, learner = next(iter(answering.learner.experts.items()))
    return AnsweringLearner(name, learner, "")


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


def adapt_from_checkpoint(
    folder: Path, support: Batch, query_x: Tensors, samples: int | None = None
) -> tuple[Prediction, Tensor]:
    """Answer to a support set from a checkpoint, by the function that scores the rounds.

    Returns the prediction, and which rows lie outside of the inputs that the run has seen, (n,).

    Args:
        folder: of the checkpoint.
        support: x (n, ...) and y (n, ...).
        query_x: inputs to predict, (m, ...).
        samples: of a belief; None for the run's number.

    Raises:
        CommandError: with exit code 78 if the checkpoint cannot be read, its model cannot be built, the model does
            not accept the tensors, or the learner that answers has a fixed number of samples.
    """
    answering, leader = restore_answering_learner(folder)
    try:
        return answering.answer(leader.state, support, query_x, samples), find_outside(leader.ranges, query_x)
    except Rejected as error:
        raise CommandError(CONFIG, error.detail) from error
    except Exception as error:  # a user's model may raise anything
        detail = describe_failure(error)
        raise CommandError(CONFIG, f"the model of {folder} does not accept these tensors: {detail}") from error


def restore_answering_learner(folder: Path) -> tuple[AnsweringLearner, Leader]:
    """Return the learner that answers in the run of a checkpoint, and what it would have published there.

    Raises:
        CommandError: with exit code 78 if the checkpoint cannot be read, or its model cannot be built.
    """
    checkpoint = open_checkpoint(folder)
    settings = TypeAdapter(TrainerSettings).validate_python(checkpoint.settings)
    torch.set_num_threads(settings.engine.threads)
    try:
        answering = build_answering_learner(settings, MemoryReplayBuffer())
        experts = answering.learner.experts if isinstance(answering.learner, Pool) else {}
        for name, learner in {**experts, answering.name: answering.learner}.items():
            learner.load(checkpoint.learners[name], checkpoint.rounds)
    except ValueError as error:
        raise CommandError(CONFIG, f"the model of {folder} cannot be built here: {error}") from error
    leads = _find_leading(answering).name
    ranges = checkpoint.learners.get(SEEN, {})
    return answering, Leader(answering.learner.state(), checkpoint.rounds, answering.name, leads, ranges=ranges)
