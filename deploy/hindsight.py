"""The hindsight process, beside the trainer: ``python -m deploy.hindsight RUN/settings.json``."""

import logging
import math
import os
import sys
import time
from contextlib import closing
from itertools import takewhile
from pathlib import Path
from threading import Event

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from deploy.child import alone, die_with_parent, stop_on_signals
from deploy.config import read_settings
from deploy.exits import DONE, TRY_LATER, Stop
from deploy.logs import Origin, log_to_stderr
from online_meta.regret import Comparator
from online_meta.setup import LearnerSetup
from online_meta.types import Params
from streams.durable import replace_file
from streams.history import History
from streams.ledger import ArchiveAway, HistoryFull
from streams.sealed import RoundThinned
from trainers.build import build_setup
from trainers.hindsight import refresh_hindsight
from trainers.json_lines import LineReader, LineWriter
from trainers.past import HistoryPast
from trainers.run_files import RunFiles
from trainers.settings import RegretSettings, TrainerSettings

POLL_SECONDS = 0.25
REST_SECONDS = 1.5
log = logging.getLogger(__name__)


def main(settings_file: str, logs: str = "text") -> int:
    """Refresh the hindsight comparator until SIGTERM; return the exit code."""
    log_to_stderr(Origin("hindsight"), logs)
    stop = stop_on_signals()
    die_with_parent()
    os.nice(10)  # The rounds go first.
    files = RunFiles(Path(settings_file).parent)
    try:
        with alone(files.folder / "hindsight.lock"):
            settings = read_settings(files.settings)
            with History.open(files.history, write=False) as history:
                watch_rounds(settings, files, history, stop)
            return DONE
    except Stop as stopped:
        log.error("%s", stopped)
        return stopped.code
    except (OSError, HistoryFull, ArchiveAway) as error:  # A full disk: it is trained anew from what was kept.
        log.error("%s", error)
        return TRY_LATER


def watch_rounds(settings: TrainerSettings, files: RunFiles, history: History, stop: Event) -> None:
    """Refresh the comparator whenever ``every_rounds`` more rounds are learned, and when the stream rests."""
    torch.set_num_threads(settings.engine.threads)
    past = HistoryPast(history, torch.device(settings.engine.device))
    with closing(past), closing(LineWriter(files.comparators)) as writer:
        _watch(settings, build_setup(settings, past, files.programs), files, history, writer, stop)


def _watch(
    settings: TrainerSettings,
    setup: LearnerSetup,
    files: RunFiles,
    history: History,
    writer: LineWriter,
    stop: Event,
) -> None:
    reader = LineReader(files.rounds)
    covered = max((line["as_of_round"] for line in LineReader(files.comparators).lines()), default=0)
    learned, skipped = 0, set[int]()
    fresh_at = time.monotonic()
    while not stop.is_set():
        for line in takewhile(lambda _: not stop.is_set(), reader.lines()):
            learned, fresh_at = learned + 1, time.monotonic()
            skipped |= {line["round"]} if line["skipped"] else set()
        rests = time.monotonic() - fresh_at > REST_SECONDS and learned >= len(history)
        target = next_target(covered, learned, settings.regret.every_rounds, rests)
        if target is None:
            stop.wait(POLL_SECONDS)
            continue
        try:
            comparator = _refresh(settings.regret, setup, files, target, covered, skipped, stop)
        except RoundThinned as error:  # Retention has overtaken it: by now there are newer rounds to look at.
            log.warning("hindsight as of round %d is given up: %s", target, error)
            stop.wait(REST_SECONDS)
            continue
        if comparator is None:
            continue
        covered = target
        if math.isfinite(comparator.cumulative_loss):
            writer.append({**comparator._asdict(), "timestamp": time.time()})
            writer.sync()


def next_target(covered: int, learned: int, every_rounds: int, rests: bool) -> int | None:
    """Return the round as of which to refresh now: the newest multiple of ``every_rounds``, or all at rest."""
    due = learned - learned % every_rounds
    if due > covered:
        return due
    return learned if rests and learned > covered else None


def _refresh(
    regret: RegretSettings,
    setup: LearnerSetup,
    files: RunFiles,
    rounds: int,
    covered: int,
    skipped: set[int],
    stop: Event,
) -> Comparator | None:
    began = time.monotonic()
    found = refresh_hindsight(
        setup,
        rounds,
        math.ceil(regret.hindsight_steps * (rounds - covered)),
        regret.hindsight_rounds,
        load_saved(files.hindsight),
        skipped,
        lambda: not stop.is_set(),
    )
    if found is None:
        return None
    if not math.isfinite(found.comparator.cumulative_loss):
        log.error("hindsight as of round %d is not finite and is trained anew from the run's first parameters", rounds)
        files.hindsight.unlink(missing_ok=True)
        return found.comparator
    replace_file(files.hindsight, save({key: value.contiguous() for key, value in found.saved.items()}), durable=True)
    log.info("hindsight as of round %d took %.1f s", rounds, time.monotonic() - began)
    return found.comparator


def load_saved(path: Path) -> Params | None:
    """Return the comparator's state; None where there is none that can be read: it can always be trained anew."""
    try:
        return load(path.read_bytes())
    except FileNotFoundError:
        return None
    except SafetensorError as error:
        log.error("%s is damaged and trained anew: %s", path, error)
        return None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
