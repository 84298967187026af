"""Fork a run: play its history with other settings from a round on, in a branch with files of its own."""

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from threading import Event
from typing import Any

from pydantic import TypeAdapter, ValidationError

from deploy.config.choices import read_plain
from deploy.config.config import find_wrong_choices, parse_settings, read_settings, set_value, write_settings
from deploy.config.learner_tables import NAME, find_wrong_learners
from deploy.config.messages import explain_error, find_unknown_keys, join_problems
from deploy.exits import BROKEN, CONFIG, TRY_LATER, CommandError, ConfigError
from deploy.processes.child import hold_lock
from online_meta.registry import nearest
from streams.atomic_files import sync_path, write_durably
from streams.history.history import History
from streams.history.retention import count_discarded
from trainers.checkpoint import CheckpointError, list_checkpoints, load_checkpoint, publish_checkpoint, write_shard
from trainers.journal.divergence import Diverged
from trainers.journal.fork_log import Branches, Fork, RecordedStage, log_drop, log_fork, read_branches
from trainers.journal.jsonl import LineWriter, find_line
from trainers.journal.quarantine import TooManyQuarantined
from trainers.journal.run_files import MAIN, RunFiles
from trainers.journal.tuning_log import settle_race
from trainers.loop.recovery import RepeatFailed
from trainers.loop.stages import Stage, find_fixed_changes, play_stages
from trainers.settings import TrainerSettings
from trainers.settings_fingerprint import SettingsChanged

TOP_LEVEL = {"run.seed": "seed", "serve.answers": "answers"}
"""Settings of a trainer that stand in another section of a configuration."""
UNFINISHED = ".{}.unfinished"


@contextlib.contextmanager
def change_branches(folder: Path) -> Iterator[Branches]:
    """Yield the branches of the run in ``folder``, which no other process changes during the block.

    Folders of forks without an event, which a kill has left, are removed first.

    Raises:
        CommandError: with exit code 78 if there is no run, 75 if another process changes the branches for long.
    """
    if not RunFiles(folder).settings.exists():
        raise CommandError(CONFIG, f"{folder} is not the folder of a run: it has no settings.json")
    with hold_lock(folder / "forks.lock"):
        branches = read_branches(folder)
        forks = RunFiles(folder).forks
        for entry in [*forks.iterdir()] if forks.is_dir() else []:
            if entry.name not in (*branches.list_names(), *branches.dropped):
                shutil.rmtree(entry)
        yield branches


def create_fork(folder: Path, at: int, changes: Sequence[str], name: str | None = None) -> Fork:
    """Make a fork of the branch that is served, and log it; it is not played yet.

    Args:
        folder: of the run.
        at: first round that is played with the changed settings.
        changes: the changed settings, as SECTION.KEY=VALUE.
        name: of the fork; by default fork-1, fork-2, ...

    Raises:
        CommandError: with exit code 78 if a setting is wrong or cannot change at that round, the name is taken, or the
            run lacks the rounds that the fork would have to play.
    """
    with change_branches(folder) as branches:
        name = _check_name(branches, name)
        parent = branches.files_of(folder, branches.served)
        before = stages_of(folder, branches, branches.served)
        after = change_settings(settle_race(read_settings(parent.settings), parent, at), changes)
        if at:
            _check_changes(settle_race(settings_at(before, at), parent, at), after, at)
        stages = (*(stage for stage in before if stage.first < at), Stage(at, after))
        recorded = tuple(RecordedStage(stage.first, dump_settings(stage.settings)) for stage in stages)
        fork = Fork(name, branches.served, at, tuple(changes), recorded, time.time())
        _write_folder(parent, RunFiles(folder, name), stages)
        log_fork(folder, fork)
    return fork


def drop_fork(folder: Path, name: str) -> None:
    """Log that a fork is no longer played, and remove its folder; if a daemon plays it, the daemon does.

    Raises ``CommandError`` with exit code 78 if there is no such fork, or it is served.
    """
    with change_branches(folder) as branches:
        if name not in branches.forks:
            raise CommandError(CONFIG, f"--drop {name!r}: {nearest(name, branches.forks)}")
        if name == branches.served:
            raise CommandError(CONFIG, f"--drop {name!r}: it is served; promote another branch before")
        log_drop(folder, name)
        with contextlib.suppress(BlockingIOError), open(RunFiles(folder, name).own / "trainer.lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(RunFiles(folder, name).own)


def _check_name(branches: Branches, name: str | None) -> str:
    """Return the name of a new fork; raises ``CommandError`` if it is taken or no name."""
    taken = [*branches.list_names(), *branches.dropped]
    if name is None:
        return next(free for free in (f"fork-{number}" for number in range(1, len(taken) + 1)) if free not in taken)
    if not NAME.fullmatch(name):
        raise CommandError(CONFIG, f"--name {name!r}: it must be letters, digits, '.', '_' or '-', such as 'slower'")
    if name in taken:
        raise CommandError(CONFIG, f"--name {name!r}: the run has had a branch of this name already; take another one")
    return name


def stages_of(folder: Path, branches: Branches, name: str) -> tuple[Stage, ...]:
    """Return the stages of a branch: from which round on it is played with which settings."""
    own = read_settings(branches.files_of(folder, name).settings)
    if name == MAIN:
        return (Stage(0, own),)
    fork = branches.forks[name]
    return (*(Stage(one.first, parse_settings(one.settings)) for one in fork.stages[:-1]), Stage(fork.at, own))


def settings_at(stages: Sequence[Stage], round: int) -> TrainerSettings:
    """Return the settings with which a round was played, or with which the rounds before ``round`` ended."""
    return next(stage.settings for stage in reversed(stages) if stage.first < max(round, 1))


def dump_settings(settings: TrainerSettings) -> dict[str, Any]:
    """Return settings as a JSON value."""
    plain: dict[str, Any] = TypeAdapter(TrainerSettings).dump_python(settings, mode="json")
    return plain


def change_settings(settings: TrainerSettings, changes: Sequence[str]) -> TrainerSettings:
    """Return the settings with changes written SECTION.KEY=VALUE.

    Raises:
        ConfigError: for a setting that is unknown, wrong, or none of learning.
    """
    raw = {**dump_settings(settings), "defaults": []}  # What a fork leaves open is as in its parent.
    for change in changes:
        path, equals, value = change.partition("=")
        top = TOP_LEVEL.get(path.strip())
        if top is not None and equals:
            set_value(raw, f"top.{top}={value}")
            raw[top] = raw.pop("top")[top]
            continue
        section = path.strip().partition(".")[0]
        if "." in path and not isinstance(raw.get(section), dict):
            known = sorted(key for key, found in raw.items() if isinstance(found, dict))
            raise ConfigError(
                f"--set {change!r}: a fork changes how the run learns: a key of [{'], ['.join(known)}], "
                f"or {' or '.join(TOP_LEVEL)}"
            )
        set_value(raw, change)
    problems = find_unknown_keys(TrainerSettings, raw, "")
    if not problems:
        try:
            made: TrainerSettings = read_plain(TrainerSettings, raw)
        except ValidationError as error:
            problems = [explain_error(item) for item in error.errors()]
        else:
            problems = [*find_wrong_choices(made)] or [*find_wrong_learners(made, made.answers)]
    if problems:
        raise ConfigError(join_problems("--set", problems))
    return made


def _check_changes(before: TrainerSettings, after: TrainerSettings, at: int) -> None:
    """Raise ``CommandError`` if the settings cannot change at a round."""
    try:
        fixed = [*find_fixed_changes(before, after)]
    except (ValueError, TypeError) as error:
        raise ConfigError(f"--set: the learners cannot be built with these settings: {error}") from error
    if fixed:
        raise CommandError(
            CONFIG,
            f"--at {at}: this cannot change at a round of a run: {'; '.join(fixed)}. Learners would have to continue "
            "with a state that does not fit. Play the whole history with the new settings: --at 0",
        )


def _write_folder(parent: RunFiles, own: RunFiles, stages: Sequence[Stage]) -> None:
    """Write the folder of a fork: settings, decisions, and the parent's newest checkpoint up to the fork's round.

    The folder appears with all its content, or not at all.
    """
    at = stages[-1].first
    with History.open(parent.history, write=False) as history:
        rounds, discarded = len(history), count_discarded(history.query)
    if at > rounds:
        raise CommandError(CONFIG, f"--at {at}: the run has {rounds} rounds, so that the latest fork is at {rounds}")
    start = _newest_checkpoint(parent, at)
    if discarded and not start:
        saved = list_checkpoints(parent.checkpoints)
        advice = f"the earliest fork is at round {saved[0]}: --at {saved[0]}" if saved else "it has no checkpoint yet"
        raise CommandError(
            CONFIG, f"--at {at}: retention has removed {discarded} rounds, which this fork would have to play; {advice}"
        )
    unfinished = own.forks / UNFINISHED.format(own.branch)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    write_settings(unfinished / own.settings.name, stages[-1].settings)
    for source in parent.decision_logs:
        if source.exists():
            lines = source.read_bytes()
            write_durably(unfinished / source.name, lines[: lines.rfind(b"\n") + 1])
    with closing(LineWriter(unfinished / parent.quarantine_log.name)) as log:
        log.append({"event": "stop"})  # The parent's trainer may be at work: the fork's has not died of that round.
        log.sync()
    if start:
        _copy_checkpoint(parent, unfinished, start)
    sync_path(unfinished)
    os.rename(unfinished, own.own)
    sync_path(own.forks)
    sync_path(own.folder)


def _newest_checkpoint(parent: RunFiles, at: int) -> int:
    """Return the round of the newest intact checkpoint at round ``at`` or before; 0 if there is none."""
    for rounds in reversed([one for one in list_checkpoints(parent.checkpoints) if one <= at]):
        with contextlib.suppress(CheckpointError):
            return load_checkpoint(parent.checkpoints / str(rounds)).rounds
    return 0


def _copy_checkpoint(parent: RunFiles, target: Path, rounds: int) -> None:
    """Copy a checkpoint, and the records of the rounds before it; raises ``CommandError`` if it vanishes meanwhile."""
    end = find_line(parent.rounds, lambda line: bool(line["round"] >= rounds))
    with open(parent.rounds, "rb") as source, open(target / parent.rounds.name, "wb") as file:
        left = end
        while left:
            block = source.read(min(left, 1 << 20))
            file.write(block)
            left -= len(block)
        file.flush()
        os.fsync(file.fileno())
    try:
        checkpoint = load_checkpoint(parent.checkpoints / str(rounds))
    except CheckpointError as error:
        raise CommandError(TRY_LATER, f"the run removes the checkpoint of round {rounds}: try again") from error
    unfinished = target / parent.checkpoints.name / f".{rounds}.unfinished"
    unfinished.mkdir(parents=True)
    digests = write_shard(unfinished, 0, checkpoint.learners)
    publish_checkpoint(unfinished, rounds, digests, checkpoint.settings, keep=1, erasures=checkpoint.erasures)


def play_branch(folder: Path, name: str, progress: Callable[[int, int], None], stop: Event | None = None) -> int:
    """Play a fork in this process up to the newest round of the history; return the number of its rounds.

    Args:
        folder: of the run.
        name: of the fork.
        progress: called with the rounds so far and their total.
        stop: set to end early.

    Raises:
        CommandError: if another process plays the fork, or it cannot be played.
    """
    branches = read_branches(folder)
    files = branches.files_of(folder, name)
    with hold_lock(files.own / "trainer.lock"), History.open(files.history, write=False) as history:
        total = len(history)
        with playing_errors(files.own):
            play_stages(
                stages_of(folder, branches, name), files, history, total, lambda done: progress(done, total), stop
            )
    return total


@contextlib.contextmanager
def playing_errors(folder: Path) -> Iterator[None]:
    """Raise ``CommandError`` about ``folder`` for whatever keeps a branch or a replay from being played."""
    try:
        yield
    except (SettingsChanged, CheckpointError) as error:
        raise CommandError(CONFIG, f"{folder}: {error}") from error
    except (RepeatFailed, TooManyQuarantined, Diverged) as error:
        raise CommandError(BROKEN, f"{folder}: {error}") from error
