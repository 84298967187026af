"""The process of the comparators, beside the trainer: ``python -m deploy.comparators RUN/settings.json``."""

import logging
import math
import os
import sys
import time
from contextlib import closing
from itertools import takewhile
from pathlib import Path
from threading import Event
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

import trainers.comparators
from deploy.adaptation import find_leader
from deploy.child import alone, die_with_parent, stop_on_signals
from deploy.config import read_settings
from deploy.exits import DONE, TRY_LATER, Stop
from deploy.logs import Origin, log_to_stderr
from online_meta import registry
from online_meta.setup import LearnerSetup
from online_meta.types import Params
from streams.durable import replace_file
from streams.history import History
from streams.ledger import ArchiveUnreachable, HistoryFull
from streams.sealed import RoundDiscarded
from trainers.build import build_setup
from trainers.comparing import Answered, Asked, GivenUp, Refresh
from trainers.json_lines import LineReader, LineWriter
from trainers.past import HistoryPast
from trainers.run_files import RunFiles
from trainers.settings import TrainerSettings

POLL_SECONDS = 0.25
REST_SECONDS = 1.5
log = logging.getLogger(__name__)


def main(settings_file: str, logs: str = "text") -> int:
    """Refresh the comparators until SIGTERM; return the exit code."""
    log_to_stderr(Origin("comparators"), logs)
    stop = stop_on_signals()
    die_with_parent()
    os.nice(10)  # The rounds go first.
    files = RunFiles(Path(settings_file).parent)
    try:
        with alone(files.folder / "comparators.lock"):
            settings = read_settings(files.settings)
            with History.open(files.history, write=False) as history:
                watch_rounds(settings, files, history, stop)
            return DONE
    except Stop as stopped:
        log.error("%s", stopped)
        return stopped.code
    except (OSError, HistoryFull, ArchiveUnreachable) as error:  # A full disk: it is trained anew from what was kept.
        log.error("%s", error)
        return TRY_LATER


def watch_rounds(settings: TrainerSettings, files: RunFiles, history: History, stop: Event) -> None:
    """Refresh each comparator whenever ``every_rounds`` more rounds are learned, and when the stream rests."""
    torch.set_num_threads(settings.engine.threads)
    past = HistoryPast(history, torch.device(settings.engine.device))
    with closing(past), closing(LineWriter(files.comparators)) as writer:
        setup = build_setup(settings, past, files.programs)
        _watch(Watch(settings, setup, files, writer, stop), history)


class Watch(NamedTuple):
    """What the process works with."""

    settings: TrainerSettings
    setup: LearnerSetup
    files: RunFiles
    writer: LineWriter
    stop: Event


def _watch(watch: Watch, history: History) -> None:
    reader, stop = LineReader(watch.files.rounds), watch.stop
    covered: dict[str, int] = dict.fromkeys(watch.settings.regret.comparator, 0)
    for line in LineReader(watch.files.comparators).lines():
        if line["kind"] in covered:
            covered[line["kind"]] = max(covered[line["kind"]], line["as_of_round"])
    learned, skipped = 0, set[int]()
    fresh_at = time.monotonic()
    while not stop.is_set():
        for line in takewhile(lambda _: not stop.is_set(), reader.lines()):
            learned, fresh_at = learned + 1, time.monotonic()
            skipped |= {line["round"]} if line["skipped"] else set()
        rests = time.monotonic() - fresh_at > REST_SECONDS and learned >= len(history)
        every = watch.settings.regret.every_rounds
        targets = {kind: next_target(done, learned, every, rests) for kind, done in covered.items()}
        if not any(targets.values()):
            stop.wait(POLL_SECONDS)
        for kind, target in targets.items():
            if target is not None and not stop.is_set():
                _answer(watch, kind, Asked(target, covered[kind], skipped, find_leader(watch.files.leader)), covered)


def next_target(covered: int, learned: int, every_rounds: int, rests: bool) -> int | None:
    """Return the round as of which to refresh now: the newest multiple of ``every_rounds``, or all at rest."""
    due = learned - learned % every_rounds
    if due > covered:
        return due
    return learned if rests and learned > covered else None


def _answer(watch: Watch, kind: str, asked: Asked, covered: dict[str, int]) -> None:
    """Refresh a comparator, write what it says; ``covered`` loses one that is given up."""
    began = time.monotonic()
    refresh: Refresh = registry.load_module(trainers.comparators, kind).refresh
    saved = load_saved(watch.files.comparator(kind))
    try:
        found = refresh(watch.setup, watch.settings.regret, asked, saved, lambda: not watch.stop.is_set())
    except RoundDiscarded as error:  # Retention has overtaken it: by now there are newer rounds to look at.
        log.warning("%s as of round %d is given up: %s", kind, asked.rounds, error)
        watch.stop.wait(REST_SECONDS)
        return
    except GivenUp as error:
        log.error("%s is not refreshed any more: %s", kind, error)
        del covered[kind]
        return
    if found is not None:
        covered[kind] = asked.rounds
        _keep(watch, found, time.monotonic() - began)


def _keep(watch: Watch, found: Answered, seconds: float) -> None:
    """Keep the comparator's state, then what it says."""
    said, path = found.comparator, watch.files.comparator(found.comparator.kind)
    if not math.isfinite(said.cumulative_loss):
        log.error("%s as of round %d is not finite and is begun anew", said.kind, said.as_of_round)
        path.unlink(missing_ok=True)
        return
    replace_file(path, save({key: value.contiguous() for key, value in found.saved.items()}), durable=True)
    watch.writer.append({**said._asdict(), "timestamp": time.time()})
    watch.writer.sync()
    note = "" if said.settled else "; its loss was still falling"
    log.info("%s as of round %d took %.1f s%s", said.kind, said.as_of_round, seconds, note)


def load_saved(path: Path) -> Params | None:
    """Return the comparator's state; None where there is none that can be read: it can always be made anew."""
    try:
        return load(path.read_bytes())
    except FileNotFoundError:
        return None
    except SafetensorError as error:
        log.error("%s is damaged and made anew: %s", path, error)
        return None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
