"""Play the rounds of a history: score, learn, report, checkpoint; from wherever the last process stopped."""

import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from online_meta.path_finder import PATIENCE_SECONDS
from online_meta.regret import LEARNER
from online_meta.types import Learner, Meta, Params, Task
from streams.history import History
from trainers.build import build_learners, build_setup
from trainers.checkpoint import Checkpoint, CheckpointError, load_latest, save_checkpoint
from trainers.durable import replace_file
from trainers.json_lines import Line, LineReader, LineWriter
from trainers.past import HistoryPast
from trainers.paths import PathBook, Steering
from trainers.plan import PlanBook
from trainers.round_lines import disagreement, round_lines
from trainers.run_files import RunFiles
from trainers.settings import TrainerSettings

POLL_SECONDS = 0.02
PUBLISH_SECONDS = 0.5
log = logging.getLogger(__name__)


class SettingsChanged(ValueError):
    """The run was begun with other settings, which its parameters depend on."""


@dataclass
class Run:
    """An open run: what is played, with whom, and the files it is written to."""

    settings: TrainerSettings
    files: RunFiles
    history: History
    learners: dict[str, Learner]
    leader: Callable[[], Meta]
    past: HistoryPast
    plans: PlanBook
    paths: PathBook
    steering: Steering
    lines: LineWriter
    known: list[Line]
    checkpoints: LineWriter
    round: int = 0
    checkpointed: int = 0
    published: tuple[int, float] = field(default=(-1, 0.0))


def open_run(settings: TrainerSettings, files: RunFiles, history: History, patience: float = PATIENCE_SECONDS) -> Run:
    """Open a run at its last whole checkpoint, or at its beginning.

    Faster paths for its meta-gradients are looked for once these have taken ``patience`` seconds.
    Raises ``SettingsChanged`` when the run was begun with settings that give other parameters,
    ``CheckpointError`` when there are checkpoints and none is whole, or rounds before it have lost their lines.
    """
    torch.set_num_threads(settings.engine.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    past = HistoryPast(history, torch.device(settings.engine.device))
    learners = build_learners(settings, build_setup(settings, past, files.programs))
    checkpoint = load_latest(files.checkpoints)
    if checkpoint is not None:
        check_same_settings(checkpoint.settings, settings)
        for name, learner in learners.items():
            learner.load(checkpoint.learners[name], checkpoint.rounds)
    rounds = 0 if checkpoint is None else checkpoint.rounds
    known = LineReader(files.rounds).refresh()
    if len(known) < rounds:  # They were durable before the checkpoint was.
        problem = f"{files.rounds} is damaged: {len(known)} lines are whole and the checkpoint is of round {rounds}"
        raise CheckpointError(f"{problem}. Restore the file, or play the history again by `online-meta replay`")
    plans, lines = PlanBook(files.plans), LineWriter(files.rounds)
    return Run(
        settings=settings,
        files=files,
        history=history,
        learners=learners,
        leader=learners[LEARNER].engine.meta,  # type: ignore[attr-defined]  # FTML alone has an engine
        past=past,
        plans=plans,
        paths=PathBook(files.paths, decisive(settings), plans.planned),
        steering=Steering(learners, settings.engine, settings.meta.batch, files.programs, patience),
        lines=lines,
        known=known[rounds:],
        checkpoints=LineWriter(files.checkpoint_log),
        round=rounds,
        checkpointed=rounds,
        published=(published_round(files.leader), 0.0),
    )


def decisive(settings: TrainerSettings) -> dict[str, Any]:
    """Return the settings that the parameters are a function of, as JSON would give them back."""
    chosen = dataclasses.asdict(settings)
    del chosen["checkpoint"], chosen["meta"]["max_rounds_per_update"]
    del chosen["engine"]["how"], chosen["engine"]["memory_limit"]  # What came of them is in the run's paths.
    chosen["regret"] = {key: chosen["regret"][key] for key in ("baselines", "options")}
    plain: dict[str, Any] = _plain(chosen)
    return plain


def check_same_settings(before: dict[str, Any], settings: TrainerSettings) -> None:
    """Raise ``SettingsChanged``, naming each difference, when ``before`` would give other parameters.

    A setting that ``before`` does not know had, before there was a choice, its default.
    """
    default = decisive(TrainerSettings(settings.model))
    before = {
        section: {**default[section], **old} if isinstance(old, dict) and section != "model" else old
        for section, old in before.items()
    }
    changes = [
        f"{section}.{key} was {old!r} and is {new!r}" if key else f"{section} was {old!r} and is {new!r}"
        for section, key, old, new in _differences(before, decisive(settings))
    ]
    if changes:
        raise SettingsChanged(
            f"this run was begun with other settings: {'; '.join(changes)}. Set them back, give the new run "
            "another run.path, or play the same history with them by `online-meta replay`"
        )


def play_rounds(run: Run, stop: Event, until: int | None = None) -> int:
    """Play rounds as they are committed, until ``stop`` is set or ``until`` rounds are learned; checkpoint.

    Returns how many are learned. What is being played when ``stop`` is set is finished first.
    """
    while not stop.is_set() and (until is None or run.round < until):
        available = len(run.history) - run.round
        if until is not None:
            available = min(available, until - run.round)
        if available <= 0:
            publish(run)
            stop.wait(POLL_SECONDS)
            continue
        play_update(run, available)
        if time.monotonic() - run.published[1] > PUBLISH_SECONDS:
            publish(run)
        if run.round - run.checkpointed >= run.settings.checkpoint.every_rounds:
            write_checkpoint(run)
    if run.round > run.checkpointed:
        write_checkpoint(run)
    publish(run)
    return run.round


def play_update(run: Run, available: int) -> None:
    """Play one plan: score its rounds with every learner, let each learn them, report."""
    plan = run.plans.decide(run.round, available, run.settings.meta.max_rounds_per_update)
    tasks: list[Task] = [run.past[round] for round in range(plan.round, plan.round + plan.rounds)]
    if not (run.known or run.paths.binds(plan.round)):  # What was played before goes by the same paths.
        run.paths.change(plan.round, run.steering.find(run.paths.at(plan.round), tasks))
    run.steering.follow(run.paths.at(plan.round))
    began = time.monotonic()
    scores = {name: [learner.score(task) for task in tasks] for name, learner in run.learners.items()}
    learned = {name: learner.learn(*tasks) for name, learner in run.learners.items()}
    seconds = time.monotonic() - began
    entries = [run.history.entry(round) for round in range(plan.round, plan.round + plan.rounds)]
    for line in round_lines(entries, scores, learned[LEARNER], seconds):
        _report(run, line)
    run.round += plan.rounds


def _report(run: Run, line: Line) -> None:
    """Append the line of a round, unless a process before this one did: a score once given stands."""
    if not run.known:
        run.lines.append(line)
        return
    before = run.known.pop(0)
    difference = disagreement(before, line)
    if difference:
        log.error("round %d does not repeat: %s (another machine, torch or model code?)", line["round"], difference)


def write_checkpoint(run: Run) -> None:
    """Make all that was reported durable, then the state that led there."""
    run.lines.sync()
    learners = {name: learner.save() for name, learner in run.learners.items()}
    checkpoint = Checkpoint(run.round, learners, decisive(run.settings))
    seconds = save_checkpoint(run.files.checkpoints, checkpoint, run.settings.checkpoint.keep)
    run.checkpoints.append({"round": run.round, "timestamp": time.time(), "seconds": seconds})
    run.checkpointed = run.round


def publish(run: Run) -> None:
    """Put the current leader where adapting processes read it, if it is newer than what they have."""
    if run.round > run.published[0]:
        replace_file(run.files.leader, leader_bytes(run.leader(), run.round), durable=True)
        run.published = (run.round, time.monotonic())


def published_round(leader: Path) -> int:
    """Return how many rounds the published leader has learned; -1 when there is none.

    Rounds that are played again after a kill are not published again: adapting never goes back.
    """
    if not leader.exists():
        return -1
    with safe_open(leader, "pt") as file:
        return int(file.metadata()["round"])


def leader_bytes(meta: Meta, rounds: int) -> bytes:
    """Return meta-parameters as safetensors: weights by name, the rule's under ``rule.``, the round beside them."""
    tensors: Params = {**meta.weights, **{f"rule.{name}": value for name, value in meta.rule.items()}}
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    return save(plain, metadata={"round": str(rounds)})


def close_run(run: Run) -> None:
    """Close the run's files."""
    run.steering.close()
    run.plans.close()
    run.paths.close()
    run.lines.close()
    run.checkpoints.close()


def _plain(value: Any) -> Any:
    """Turn tuples into lists, as JSON does, so that settings compare equal after a round trip."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, str, Any, Any]]:
    found: list[tuple[str, str, Any, Any]] = []
    for section in sorted(before.keys() | now.keys()):
        old, new = before.get(section), now.get(section)
        if isinstance(old, dict) and isinstance(new, dict):
            keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
            found += [(section, key, old.get(key), new.get(key)) for key in keys]
        elif old != new:
            found.append((section, "", old, new))
    return found
