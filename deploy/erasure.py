"""Forget an entity: erase its tasks from every file of a run, and let the learners learn again without them."""

import shutil
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

from deploy.exits import CONFIG, TRY_LATER, CommandError
from deploy.processes.child import hold_lock
from streams.atomic_files import replace_file
from streams.entities import quote_key
from streams.history.erasure import (
    LOG,
    Erasure,
    erase_from_archive,
    erase_letters,
    erase_rounds,
    list_erased_rounds,
    list_logs,
    list_pending,
    log_erasures,
    note_complete,
    plan_erasure,
    read_erasures,
    rewrite_ledger,
)
from streams.history.errors import HistoryBusy
from streams.history.history import History
from streams.history.observations import list_observed
from streams.history.predictions import list_predicted
from streams.history.retention import list_removed
from streams.ingest.dead_letters import read_letters
from streams.segmenting.by_entity import SUFFIX, read_saved
from trainers.checkpoint import list_outdated
from trainers.journal.forgetting import forget_rounds
from trainers.journal.fork_log import read_branches
from trainers.journal.run_files import RunFiles

STEPS = ("logged", "ledger", "archive", "dead letters", "branches", "rewritten", "complete")
"""What is done, in this order. A kill between two steps, or in one, is made good by the next start."""
DERIVED_FOLDERS = ("replay", "tune")
"""The folders of a run in which other commands keep what they have learned from its rounds."""


class Forgotten(NamedTuple):
    """What an erasure did: the rounds whose tasks are gone, and how many rounds each branch has still learned.

    Without rounds, checkpoints from before the erasure are gone, which a backup had brought back.
    """

    erasure: Erasure
    rounds: tuple[int, ...]
    learned: dict[str, int]

    def __str__(self) -> str:
        """Describe it for the log."""
        kept = ", ".join(f"{name} has learned {rounds} rounds" for name, rounds in self.learned.items())
        return f"{self.erasure.digest[:16]}…, of {len(self.rounds)} rounds{kept and f'; now {kept}'}"


def forget_entity(folder: Path, key: str | None, reached: Callable[[str], None] = lambda step: None) -> list[Forgotten]:
    """Erase all that the run in ``folder`` holds of an entity, after the erasures that are not complete yet.

    Args:
        folder: of the run; its daemon must be stopped.
        key: of the entity; None only completes earlier erasures.
        reached: called with each of ``STEPS`` once it is done.

    Raises:
        CommandError: with exit code 75 if the run is in use, 78 if there is no run, or nothing of the entity.
    """
    files = RunFiles(folder)
    if not files.history.is_dir():
        raise CommandError(CONFIG, f"{folder} is not the folder of a run: it has no history")
    try:
        with closing(History.open(files.history, write=True)) as history:
            found = apply_erasures(history, folder, reached)
            if key is None:
                return found
            erasure = plan_erasure(history, key)
            letters = (letter["id"] for _, letter in read_letters(files.dead_letters))
            open_rows = (saved and key in saved.entities for saved in map(read_saved, files.sources.glob(f"*{SUFFIX}")))
            observed = key in list_observed(history) or key in list_predicted(history)
            if not (erasure.rounds or observed or any(map(erasure.names, letters)) or any(open_rows)):
                raise CommandError(CONFIG, f"{folder} has nothing of an entity {key!r}: is this its key?")
            log_erasures(history, [erasure])
            reached("logged")
            return [*found, *apply_erasures(history, folder, reached)]
    except HistoryBusy as error:
        raise CommandError(TRY_LATER, f"{error}: stop the daemon of this run first") from error


def apply_erasures(
    history: History, folder: Path, reached: Callable[[str], None] = lambda step: None
) -> list[Forgotten]:
    """Complete the erasures that the logs have and the ledger has not noted, as after a kill or a restore.

    Args:
        history: of the run, open for writing; nothing else may play the run.
        folder: of the run.
        reached: called with each of ``STEPS`` once it is done.
    """
    pending = list_pending(history)
    if not pending and not _list_restored(history, _list_branches(folder)):
        return []
    with ExitStack() as locks:
        locks.enter_context(hold_lock(folder / "forks.lock"))
        files = _list_branches(folder)
        for one in files.values():
            if one.own.is_dir():
                locks.enter_context(hold_lock(one.own / "trainer.lock"))
        log_erasures(history, pending)
        done = [_apply(history, files, erasure, reached) for erasure in pending]
        return [*done, *_forget_restored(history, files)]


def _apply(
    history: History, branches: dict[str, RunFiles], erasure: Erasure, reached: Callable[[str], None]
) -> Forgotten:
    run = next(iter(branches.values()))
    rounds = erase_rounds(history, erasure)
    reached("ledger")
    erase_from_archive(history, set(rounds))
    reached("archive")
    erase_letters(run.dead_letters, erasure)
    reached("dead letters")
    learned = {}
    if rounds:
        for name, files in branches.items():
            if files.own.is_dir():
                learned[name] = forget_rounds(files, rounds, partial(list_removed, history.query))
        _remove_derived(run, branches)
    shutil.rmtree(run.sources, ignore_errors=True)  # It is made again, from the rows without those of the entity.
    reached("branches")
    rewrite_ledger(history)
    reached("rewritten")
    note_complete(history, erasure)
    reached("complete")
    return Forgotten(erasure, tuple(rounds), learned)


def _list_branches(folder: Path) -> dict[str, RunFiles]:
    branches = read_branches(folder)
    return {name: branches.files_of(folder, name) for name in branches.list_names()}


def _list_restored(history: History, branches: dict[str, RunFiles]) -> list[str]:
    """Return the branches with a checkpoint that has learned from tasks that were erased since, as a backup has it."""
    erased = list_erased_rounds(history)
    return [name for name, files in branches.items() if any(erased) and list_outdated(files.checkpoints, erased)]


def _forget_restored(history: History, branches: dict[str, RunFiles]) -> list[Forgotten]:
    """Forget what restored checkpoints have learned from erased tasks, and all that was learned after these."""
    rounds = sorted({round for gone in list_erased_rounds(history) for round in gone})
    learned = {
        name: forget_rounds(branches[name], rounds, partial(list_removed, history.query))
        for name in _list_restored(history, branches)
    }
    return [Forgotten(read_erasures(history)[-1], (), learned)] if learned else []


def _remove_derived(run: RunFiles, branches: dict[str, RunFiles]) -> None:
    """Remove folders with learners that no branch plays any more: forks that were dropped, replays and races."""
    kept = {files.own for files in branches.values()} | {RunFiles(run.folder, "main").leader.parent}
    forks = [entry for entry in run.forks.iterdir() if entry not in kept] if run.forks.is_dir() else []
    for folder in [*forks, *(run.folder / name for name in DERIVED_FOLDERS)]:
        shutil.rmtree(folder, ignore_errors=True)


def find_remains(folder: Path, key: str) -> list[Path]:
    """Return the files of a run that still name an entity as ids do, whatever wrote them."""
    mark = f"..{quote_key(key)}..".encode()
    own = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [path for path in own if mark in path.read_bytes()]


def adopt_epoch(history: History, out: RunFiles) -> int:
    """Let a replay follow the history as it is since its last erasure, and return the number of erasures.

    Args:
        history: to replay.
        out: files of the replay, which keep the log of the erasures that it knows.

    Raises:
        CommandError: with exit code 78 if the history is a copy from before an erasure, or the replay has learned from
            rounds that were erased since.
    """
    if pending := list_pending(history):
        raise CommandError(
            CONFIG,
            f"{history.path} is from before {len(pending)} erasures that {list_logs(history.path)[1]} has, as a backup "
            f"is: run `online-meta forget {history.path.parent}` first, which makes them here, too",
        )
    log, copy = history.path / LOG, out.history / LOG
    now, before = (path.read_bytes() if path.exists() else b"" for path in (log, copy))
    if now != before and out.rounds.exists():
        raise CommandError(
            CONFIG,
            f"{out.folder} has learned from rounds that were erased from {history.path} since: a replay starts from "
            "the last erasure. Remove that folder, or choose another one with --out",
        )
    if now != before:
        copy.parent.mkdir(parents=True, exist_ok=True)
        replace_file(copy, now, durable=False)
    return len(now.splitlines())
