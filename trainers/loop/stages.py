"""Play a history in stages, each with settings of its own from a round on: so a fork begins with its parent's."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from threading import Event
from typing import Any, NamedTuple

from online_meta.learners import MemoryReplayBuffer
from streams.history.history import History
from trainers.build import build_context, build_learners
from trainers.checkpoint import (
    begin_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_latest,
    publish_checkpoint,
    write_shard,
)
from trainers.journal.run_files import RunFiles
from trainers.learner_settings import has_pool, list_learners, list_players, override_settings
from trainers.loop.rounds import open_run, play_rounds
from trainers.loop.run import close_run
from trainers.settings import LearnerSettings, TrainerSettings
from trainers.settings_fingerprint import adopt_recorded_settings, changeable_keys, reproducibility_key


class Stage(NamedTuple):
    """The settings with which the rounds from ``first`` on are played."""

    first: int
    settings: TrainerSettings


def list_stages_left(stages: Sequence[Stage], files: RunFiles) -> Iterator[tuple[TrainerSettings, int | None]]:
    """Yield the settings with which a branch continues, and the round at which they end; None for the last ones.

    Where a stage begins, the newest checkpoint becomes one of its own settings: every learner keeps its state. Between
    two items, the caller opens the run, plays its rounds up to the end of the stage, and closes it.

    Args:
        stages: of the branch, in their order; the first one begins at round 0.
        files: of the branch.

    Raises:
        CheckpointError: if there are checkpoints and all are damaged.
    """
    for stage, after in zip_longest(stages, stages[1:]):
        newest = load_latest(files.checkpoints)
        reached = 0 if newest is None else newest.rounds
        if after is not None and reached >= after.first:
            continue
        if newest is not None and reached == stage.first:
            _adopt_checkpoint(files, reached, stage.settings)
        yield stage.settings, None if after is None else after.first


def _adopt_checkpoint(files: RunFiles, rounds: int, settings: TrainerSettings) -> None:
    """Record other settings in a checkpoint. A kill on the way leaves an older checkpoint, from which it is remade."""
    checkpoint = load_checkpoint(files.checkpoints / str(rounds))
    key = reproducibility_key(adopt_recorded_settings(settings, checkpoint.settings))
    if checkpoint.settings == key:
        return
    unfinished = begin_checkpoint(files.checkpoints, rounds)
    digests = write_shard(unfinished, 0, checkpoint.learners)
    older = list_checkpoints(files.checkpoints)
    keep, erasures = settings.checkpoint.keep, checkpoint.erasures
    publish_checkpoint(unfinished, rounds, digests, key, keep, older, erasures)


def play_stages(
    stages: Sequence[Stage],
    files: RunFiles,
    history: History,
    rounds: int,
    progress: Callable[[int], None],
    stop: Event | None = None,
) -> None:
    """Play a branch up to a number of rounds in this process; it continues after its newest checkpoint.

    Args:
        stages: of the branch.
        files: of the branch.
        history: to play.
        rounds: number of rounds at which to end; the history has at least as many.
        progress: called with the number of rounds so far, at each checkpoint.
        stop: set to end early, with a checkpoint.

    Raises:
        SettingsChanged: if the files belong to other settings.
        CheckpointError: if there are checkpoints and all are damaged.
        RepeatFailed, TooManyQuarantined, Diverged: as ``play_rounds`` does.
    """
    stop = stop or Event()
    for settings, end in list_stages_left(stages, files):
        last = rounds if end is None else min(end, rounds)
        run = open_run(settings, files, history)
        try:
            done = -1
            while done < last and not stop.is_set():  # at least once, so that the leader is published
                done = play_rounds(run, stop, min(run.round + settings.checkpoint.every_rounds, last))
                progress(done)
        finally:
            close_run(run)
        if stop.is_set() or last == rounds:
            return


def find_fixed_changes(before: TrainerSettings, after: TrainerSettings) -> Iterator[str]:
    """Yield what is different in ``after`` and cannot change at a round: learners could not go on with their state.

    Args:
        before: settings of the rounds before.
        after: settings from the round on.
    """
    other = [*_find_other_keys("model", before, after), *_find_other_keys("pool", before, after)]
    yield from other
    if before.seed != after.seed:
        yield "run.seed"
    added = [name for name in list_players(after) if name not in list_players(before)]
    if added:
        yield f"the learner {added[0]!r}, which plays from the first round on"
        return
    old, new = ({one.name: one for one in list_learners(settings)} for settings in (before, after))
    if has_pool(after) and _list_experts(before) != _list_experts(after):
        yield "the experts of the pool, which weighs them by all their losses"
        return
    for name in new:
        was, now = override_settings(before, old[name]), override_settings(after, new[name])
        if set(_list_answers(now)) - set(_list_answers(was)):
            yield "the answers of [inner]: a further one is scored from the first round on"
            return
        if _describe_optimizer(old[name], was) != _describe_optimizer(new[name], now):
            yield f"the optimizer of {name!r}, whose state another one cannot read"
            return
    if not other:
        yield from _find_other_states(before, after)


def _find_other_keys(section: str, before: TrainerSettings, after: TrainerSettings) -> Iterator[str]:
    """Yield the keys of a section that are different, without those that any restart may change."""
    old, new, known = getattr(before, section), getattr(after, section), changeable_keys(before)[section]
    for item in dataclasses.fields(old):
        if item.name not in known and getattr(old, item.name) != getattr(new, item.name):
            yield f"{section}.{item.name}"


def _list_experts(settings: TrainerSettings) -> list[Any]:
    """Return what decides which answers the pool weighs: the learners that are no shadows, and their answers."""
    players = [one for one in list_learners(settings) if not one.shadow]
    return [(one.name, _list_answers(override_settings(settings, one))) for one in players]


def _list_answers(settings: TrainerSettings) -> list[str]:
    """Return what says how many answers a learner gives after adapting."""
    inner = settings.inner
    rules = [f"{name}: {rule!r}" for name, rule in sorted(inner.answer_rules.items())]
    return [*map(str, sorted(inner.answer_steps)), *sorted(inner.answer_heads), *rules]


def _describe_optimizer(learner: LearnerSettings, settings: TrainerSettings) -> tuple[Any, ...]:
    """Return what decides the state of a learner's optimizer."""
    meta = settings.meta
    return learner.kind, meta.optimizer, meta.optimizer_options, learner.options.get("optimizer")


def _find_other_states(before: TrainerSettings, after: TrainerSettings) -> Iterator[str]:
    """Yield a sentence for each learner of ``after`` whose state has other tensors than before."""
    old, new = (build_learners(one, build_context(one, MemoryReplayBuffer())) for one in (before, after))
    for name, learner in new.items():
        layouts = [
            {key: (value.shape, value.dtype) for key, value in one.save().items()} for one in (old[name], learner)
        ]
        if layouts[0] != layouts[1]:
            yield f"the state of {name!r}, which has other tensors with these settings"
