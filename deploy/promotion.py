"""Choose the branch of a run that is served, and with which settings each of its branches is played."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from deploy.config.config import Config, parse_settings, read_settings, write_settings
from deploy.exits import CONFIG, TRY_LATER, CommandError, ConfigError
from deploy.forks import change_branches
from online_meta.registry import nearest
from streams.atomic_files import replace_file, sync_path
from trainers.checkpoint import list_checkpoints, read_latest_settings
from trainers.journal.fork_log import Branches, Promotion, log_promotion, read_branches
from trainers.journal.jsonl import read_last_line
from trainers.journal.run_files import MAIN, RunFiles
from trainers.journal.tuning_log import settings_of_checkpoint
from trainers.learner_settings import find_player
from trainers.settings import TrainerSettings
from trainers.settings_fingerprint import (
    SettingsChanged,
    changeable_keys,
    check_same_settings,
    reproducibility_key,
)


class Settled(NamedTuple):
    """How a run is served: the configuration and the files of the branch, and the settings of every branch by name."""

    config: Config
    files: RunFiles
    settings: dict[str, TrainerSettings]


def settle_branches(config: Config, branches: Branches) -> Settled:
    """Find the files of the branch that a run serves, and with which settings each branch is played.

    A fork keeps the settings that decide its parameters; the others are those of the configuration, unless it changed
    them. The configuration is that of the run's first branch. If a fork is served, it may also be that of the fork.

    Raises:
        ConfigError: if a fork is served, and the configuration is that of neither.
    """
    folder = Path(config.run.path)
    now = config.trainer()
    settings = {
        name: _renew(_read_own(folder, branches, name), now, _list_changed(branches, name)) for name in branches.forks
    }
    served, first = branches.served, branches.files_of(folder, MAIN)
    settings[MAIN] = now
    if branches.promotions:
        recorded = read_settings(first.settings)
        try:
            check_same_settings(reproducibility_key(recorded), now)
        except SettingsChanged as error:
            settings[MAIN] = _renew(recorded, now, set())
            try:
                check_same_settings(reproducibility_key(settings[served]), now)
            except SettingsChanged:
                raise ConfigError(f"{folder}: {error}") from error
    files = branches.files_of(folder, served)
    config = config if settings[served] is now else adapt_config(config, settings[served])
    return Settled(config, files, settings)


def _read_own(folder: Path, branches: Branches, name: str) -> TrainerSettings:
    """Return the settings of a fork; if its folder is lost, those of its event, by which it is played again."""
    path = branches.files_of(folder, name).settings
    return read_settings(path) if path.exists() else parse_settings(branches.forks[name].stages[-1].settings)


def write_branches(settled: Settled) -> None:
    """Write the settings of every branch, and let the published leader be that of the branch that is served."""
    folder = settled.files.folder
    branches = read_branches(folder)
    for name, settings in settled.settings.items():
        files = branches.files_of(folder, name)
        files.own.mkdir(parents=True, exist_ok=True)
        write_settings(files.settings, settings)
    link_leader(folder, branches)


def adapt_config(config: Config, settings: TrainerSettings) -> Config:
    """Return the configuration with these settings of learning."""
    names = {item.name for item in dataclasses.fields(settings)} & {item.name for item in dataclasses.fields(config)}
    run, serve = replace(config.run, seed=settings.seed), replace(config.serve, answers=settings.answers)
    return replace(config, **{name: getattr(settings, name) for name in names}, run=run, serve=serve)


def _list_changed(branches: Branches, name: str) -> set[str]:
    """Return the SECTION.KEY of everything that a fork and its parents have changed."""
    if name == MAIN:
        return set()
    fork = branches.find_fork(name)
    own = {".".join(change.partition("=")[0].strip().split(".")[:2]) for change in fork.changes}
    return own | _list_changed(branches, fork.parent)


def _renew(recorded: TrainerSettings, now: TrainerSettings, changed: set[str]) -> TrainerSettings:
    """Return recorded settings with the values of ``now`` where they may change, unless a fork has changed them."""
    sections = {}
    for section, keys in changeable_keys(now).items():
        values = {key: getattr(getattr(now, section), key) for key in keys if f"{section}.{key}" not in changed}
        sections[section] = replace(getattr(recorded, section), **values)
    renewed = replace(recorded, **sections, import_folder=now.import_folder)
    with contextlib.suppress(ValueError):
        if "serve.answers" not in changed:
            find_player(renewed, now.answers)
            renewed = replace(renewed, answers=now.answers)
    return renewed


def count_learned(files: RunFiles) -> int:
    """Return the number of rounds that a branch has played."""
    last = read_last_line(files.rounds)
    return 0 if last is None else int(last["round"]) + 1


def promote_branch(folder: Path, name: str, prepare: Callable[[Branches], None] = lambda _: None) -> Promotion:
    """Log that a branch is served from now on; a running daemon switches to it soon.

    Args:
        folder: of the run.
        name: of the branch.
        prepare: called with the branches after the promotion, once the branch is known to be ready and before the event
            is logged.

    Raises:
        CommandError: with exit code 78 if there is no such branch or it is served already, 75 if it is not ready.
    """
    with change_branches(folder) as branches:
        promotion = Promotion(name, _check_ready(folder, branches, name), branches.served, time.time())
        after = branches.promote(promotion)
        prepare(after)
        log_promotion(folder, promotion)
        link_leader(folder, after)
    return promotion


def _check_ready(folder: Path, branches: Branches, name: str) -> int:
    """Return the number of rounds that a branch has learned; raises ``CommandError`` if it cannot be served now."""
    if name not in branches.list_names():
        raise CommandError(CONFIG, f"{folder} has no branch {name!r}: {nearest(name, branches.list_names())}")
    if name == branches.served:
        raise CommandError(CONFIG, f"{name} is the branch that {folder} serves already")
    files, served = branches.files_of(folder, name), branches.files_of(folder, branches.served)
    settings = read_settings(files.settings)
    recorded = read_latest_settings(files.checkpoints)
    learned, others = count_learned(files), count_learned(served)
    wait = "wait until it has caught up: `online-meta status` and `online-meta fork --wait` show it"
    if recorded is None or not files.leader.exists():
        raise CommandError(TRY_LATER, f"{name} has not published anything that could be served: {wait}")
    try:
        newest = max(list_checkpoints(files.checkpoints))
        check_same_settings(recorded, settings_of_checkpoint(settings, files, newest))
    except SettingsChanged as error:
        raise CommandError(TRY_LATER, f"{name} plays the rounds before its own still: {wait}") from error
    every = settings.checkpoint.every_rounds
    if others - learned > every:
        raise CommandError(
            TRY_LATER,
            f"{name} has learned {learned} rounds and {branches.served} {others}; it may be at most {every} "
            f"behind, as after a restart: {wait}",
        )
    return learned


def link_leader(folder: Path, branches: Branches) -> None:
    """Let RUN/leader.safetensors be what the served branch publishes, once a fork was promoted: a symbolic link.

    What the first branch has published there before is kept under its own name.
    """
    if not branches.promotions:
        return
    link, target = RunFiles(folder).served_leader, branches.files_of(folder, branches.served).leader
    if link.is_file() and not link.is_symlink():
        own = RunFiles(folder, MAIN).leader
        own.parent.mkdir(parents=True, exist_ok=True)
        replace_file(own, link.read_bytes(), durable=True)
    relative = target.relative_to(folder)
    if link.is_symlink() and link.readlink() == relative:
        return
    new = link.with_name(link.name + ".link")
    new.unlink(missing_ok=True)
    new.symlink_to(relative)
    os.replace(new, link)
    sync_path(folder)
