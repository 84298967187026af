"""What the leading rank of a run writes: plans and paths before a round is played, its lines and the leader after."""

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from safetensors.torch import save

from online_meta.types import Meta, Params
from streams.durable import replace_file
from trainers.checkpoint import CheckpointError
from trainers.decisive import fingerprint
from trainers.divergence import RollbackBook, Streak, streak_of
from trainers.json_lines import Line, LineReader, LineWriter, find_line, read_line
from trainers.paths import PathBook
from trainers.plan import PlanBook
from trainers.round_lines import disagreement
from trainers.run_files import RunFiles
from trainers.settings import TrainerSettings

log = logging.getLogger(__name__)


class Published(NamedTuple):
    """The leader that adapting processes read: its rounds, the updates on past rounds alone since, and when."""

    rounds: int
    updates: int
    at: float


@dataclass
class Desk:
    """The open files of a run; ``known`` are the lines of rounds that were played already, beyond the checkpoint."""

    settings: TrainerSettings
    files: RunFiles
    plans: PlanBook
    paths: PathBook
    rollbacks: RollbackBook
    streak: Streak
    lines: LineWriter
    known: list[Line]
    checkpoints: LineWriter
    published: Published
    told: tuple[int, float] = field(default=(-1, 0.0))
    started: float = field(default_factory=time.time)


def open_desk(settings: TrainerSettings, files: RunFiles, rounds: int) -> Desk:
    """Open the files of a run whose last checkpoint is of ``rounds`` rounds.

    Raises ``CheckpointError`` when rounds before it have lost their lines.
    """
    position = _behind(files.rounds, rounds)
    plans, lines = PlanBook(files.plans, rounds), LineWriter(files.rounds, position)
    own = fingerprint(settings)
    rollbacks = RollbackBook(files.rollbacks, own)
    return Desk(
        settings=settings,
        files=files,
        plans=plans,
        paths=PathBook(files.paths, own, plans.planned),
        rollbacks=rollbacks,
        streak=streak_of(files.rounds, rounds, rollbacks.before(rounds)),
        lines=lines,
        known=LineReader(files.rounds, position).refresh(),
        checkpoints=LineWriter(files.checkpoint_log),
        published=published_leader(files.leader),
    )


def _behind(path: Path, rounds: int) -> int:
    """Return where the lines of rounds beyond the checkpoint begin; the others are there, though few are read.

    Raises ``CheckpointError`` when the last of them is not where it has to be.
    """
    last = read_line(path, find_line(path, lambda line: bool(line["round"] >= rounds - 1))) if rounds else None
    if last and last[0]["round"] == rounds - 1:
        return last[1]
    if rounds:  # They were durable before the checkpoint was.
        whole = sum(1 for _ in LineReader(path).lines())
        problem = f"{path} is damaged: {whole} lines are whole and the checkpoint is of round {rounds}"
        raise CheckpointError(f"{problem}. Restore the file, or play the history again by `online-meta replay`")
    return 0


def report(desk: Desk, line: Line) -> None:
    """Append the line of a round, unless a process before this one did: a score once given stands."""
    desk.streak.note(line)
    if not desk.known:
        desk.lines.append(line)
        return
    before = desk.known.pop(0)
    difference = disagreement(before, line)
    if difference:
        log.error("round %d does not repeat: %s (another machine, torch or model code?)", line["round"], difference)


def publish(desk: Desk, meta: Meta, rounds: int, updates: int = 0) -> None:
    """Put the current leader where adapting processes read it, if it is newer than what they have."""
    if (rounds, updates) > desk.published[:2]:
        replace_file(desk.files.leader, leader_bytes(meta, rounds, updates), durable=True)
        desk.published = Published(rounds, updates, time.monotonic())


def published_leader(leader: Path) -> Published:
    """Return how many rounds the published leader has learned, and the updates since; -1 rounds when there is none.

    Rounds that are played again after a kill are not published again: adapting never goes back.
    """
    if not leader.exists():
        return Published(-1, 0, 0.0)
    with safe_open(leader, "pt") as file:
        told = file.metadata()
        return Published(int(told["round"]), int(told.get("updates", 0)), 0.0)


def leader_bytes(meta: Meta, rounds: int, updates: int = 0) -> bytes:
    """Return meta-parameters as safetensors: weights by name, the rule's under ``rule.``, the round beside them.

    So are the ``updates`` that were made on past rounds alone since then, where there are any.
    """
    tensors: Params = {**meta.weights, **{f"rule.{name}": value for name, value in meta.rule.items()}}
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    return save(plain, metadata={"round": str(rounds)} | ({"updates": str(updates)} if updates else {}))


def close_desk(desk: Desk) -> None:
    """Close the run's files."""
    desk.plans.close()
    desk.paths.close()
    desk.rollbacks.close()
    desk.lines.close()
    desk.checkpoints.close()
