"""Play the branches of a run that are not served in background processes, and change the branch that is served."""

import logging
import shutil
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from deploy.checks.model import list_scored
from deploy.checks.preflight import check_learning
from deploy.config.config import Config
from deploy.exits import TRY_LATER, CommandError
from deploy.leader import Adapter
from deploy.logs import copy_lines
from deploy.processes.supervisor import SupervisedProcess
from deploy.processes.trainer import BACKGROUND
from deploy.promotion import Settled, count_learned, link_leader, promote_branch, settle_branches, write_branches
from deploy.telemetry.facts import ProcessFacts
from deploy.telemetry.process_monitor import ProcessMonitor
from deploy.telemetry.run_view import RunView, open_view
from online_meta.regret.differences import Differences, confidence_sequence
from trainers.journal.fork_log import Branches, read_branches
from trainers.journal.heartbeat import reset_heartbeat
from trainers.journal.jsonl import Line, parse_line
from trainers.journal.run_files import MAIN, RunFiles
from trainers.learner_settings import find_player

POLL_SECONDS, RETRY_SECONDS = 0.25, 5.0
ROUNDS_AT_ONCE = 500
log = logging.getLogger(__name__)


def start_child(
    name: str, config: Config, files: RunFiles, on_broken: Callable[[], None] | None = None, role: str = ""
) -> SupervisedProcess:
    """Start a child process of the daemon that works on a branch of the run.

    Args:
        name: "trainer" or "comparators".
        config: with which the branch is played.
        files: of the branch.
        on_broken: called when the child ends with exit code 70; see ``SupervisedProcess``.
        role: ``BACKGROUND`` for the trainer of a branch that is not served.
    """
    program = "ranks" if name == "trainer" and config.engine.is_distributed and not role else name
    settings = RunFiles(files.folder).settings
    command = [sys.executable, "-m", f"deploy.processes.{program}", str(settings), config.run.logs]
    command += [files.branch or ""] * bool(files.branch or role) + [role] * bool(role)
    label = f"trainer of {files.branch or MAIN}" if role else name
    return SupervisedProcess(label, command, on_broken, copy_lines if config.run.logs == "json" else None)


class PairedLosses:
    """Follows the losses of two branches in the same rounds.

    Args:
        branches: the files of a branch and of the served one.
        answers: the name of the answer of each whose loss counts.
        first: round from which they are compared.
    """

    def __init__(self, branches: tuple[RunFiles, RunFiles], answers: tuple[str, str], first: int) -> None:
        """Start without a round."""
        self._paths, self._answers, self._first = [files.rounds for files in branches], answers, first
        self._positions = [0, 0]
        self.totals = [0.0, 0.0]
        self.differences = Differences(0, 0.0, 0.0)

    def refresh(self) -> None:
        """Read the rounds that both have played since, some hundreds at a time."""
        if not all(path.exists() for path in self._paths):
            return
        with open(self._paths[0], "rb") as mine, open(self._paths[1], "rb") as other:
            for file, position in zip((mine, other), self._positions, strict=True):
                file.seek(position)
            for _ in range(ROUNDS_AT_ONCE):
                texts = [mine.readline(), other.readline()]
                lines = parse_line(texts[0]), parse_line(texts[1])
                if lines[0] is None or lines[1] is None:
                    return
                self._positions = [at + len(text) for at, text in zip(self._positions, texts, strict=True)]
                self._add(lines[0], lines[1])

    def _add(self, mine: Line, served: Line) -> None:
        losses = _loss_of(mine, self._answers[0]), _loss_of(served, self._answers[1])
        if losses[0] is None or losses[1] is None or mine["round"] < self._first:
            return
        difference = losses[0] - losses[1]
        self.totals = [self.totals[0] + losses[0], self.totals[1] + losses[1]]
        rounds, total, squares = self.differences
        self.differences = Differences(rounds + 1, total + difference, squares + difference**2)

    def describe(self) -> dict[str, Any]:
        """Return the rounds that both have scored, their mean losses, and the mean difference with its interval."""
        rounds = self.differences.rounds
        means = [total / rounds if rounds else None for total in self.totals]
        return {
            "from": self._first,
            "rounds": rounds,
            "mean_loss": means[0],
            "mean_loss_served": means[1],
            "mean_difference": self.differences.mean() if rounds else None,
            "interval": confidence_sequence(self.differences),
        }


def _loss_of(line: Line, answer: str) -> float | None:
    """Return the loss of an answer in a round: what it is charged if it is not finite; None if it was not scored."""
    score = line["learners"].get(answer)
    if score is None:
        return None
    loss: float | None = score["loss_after"]
    return score.get("charged") if loss is None else loss


class Prepared(NamedTuple):
    """What is needed to serve a branch, made before it is served."""

    settled: Settled
    adapter: Adapter
    view: RunView

    @property
    def name(self) -> str:
        """The name of the branch."""
        return self.settled.files.branch or MAIN


def prepare_branch(config: Config, branches: Branches) -> Prepared:
    """Build what answers, and read the records, of the branch that is served according to ``branches``."""
    settled = settle_branches(config, branches)
    scored = list_scored(settled.config, check_learning(settled.config))
    adapter = Adapter(settled.config.trainer(), settled.files.leader)
    adapter.leader()
    view = open_view(settled.files, settled.config, scored)
    view.refresh()
    return Prepared(settled, adapter, view)


class ForkSupervisor:
    """Plays the branches that are not served, each in a process of low priority, and follows the log of forks.

    One thread starts all processes, for the kernel ends a child when the thread that started it ends.

    Args:
        config: of the file; a fork changes the settings of learning in it.
        settled: the branch that is served at the start.
        children: the processes of the branch that is served, by name; they are replaced when another branch is.
        stop_seconds: how long a child may take to stop when its branch takes another role.
    """

    def __init__(
        self, config: Config, settled: Settled, children: dict[str, SupervisedProcess], stop_seconds: float
    ) -> None:
        """Play nothing before ``start``."""
        self._config, self._folder, self._settled = config, settled.files.folder, settled
        self._children, self._stop_seconds = children, stop_seconds
        self._running = settled
        self._branches = read_branches(self._folder)
        self._background: dict[str, SupervisedProcess] = {}
        self._monitors: dict[str, ProcessMonitor] = {}
        self._pairs: dict[str, PairedLosses] = {}
        self._changing, self._lock = threading.Lock(), threading.RLock()
        self._closing, self._ended, self._wake = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="forks", daemon=True)

    def start(
        self, switch: Callable[[Prepared], None], follow: Callable[[Settled], None], on_broken: Callable[[], None]
    ) -> None:
        """Start the thread.

        Args:
            switch: called to serve another branch; it returns at once, and no request fails meanwhile.
            follow: called when the processes of the newly served branch have started.
            on_broken: called when its trainer cannot continue.
        """
        self._switch, self._follow, self._on_broken = switch, follow, on_broken
        self._thread.start()

    @property
    def served(self) -> str:
        """The name of the branch that is served."""
        return self._settled.files.branch or MAIN

    def list_names(self) -> list[str]:
        """Return the names of all branches, those of new forks included."""
        return read_branches(self._folder).list_names()

    def promote(self, name: str) -> int:
        """Serve another branch from now on; return the number of rounds that it has learned.

        Raises ``CommandError`` as ``promote_branch`` does.
        """
        prepared: list[Prepared] = []

        def prepare(branches: Branches) -> None:
            prepared.append(prepare_branch(self._config, branches))

        with self._changing:
            if self._closing.is_set():
                raise CommandError(TRY_LATER, "the daemon is draining: promote it after the next start")
            promotion = promote_branch(self._folder, name, prepare)
            self._apply(prepared[0])
        self._wake.set()
        return promotion.round

    def describe(self) -> dict[str, Any]:
        """Return the answer of ``/v1/forks``: the branch that is served, and every branch."""
        with self._lock:
            found = [self._describe(self._branches, name) for name in self._branches.list_names()]
            return {"served": self.served, "forks": found}

    def _describe(self, branches: Branches, name: str) -> dict[str, Any]:
        fork, child, pair = branches.forks.get(name), self._background.get(name), self._pairs.get(name)
        if name == self.served:
            child, pair = self._children.get("trainer"), None
        return {
            "name": name,
            "served": name == self.served,
            "parent": None if fork is None else fork.parent,
            "at": 0 if fork is None else fork.at,
            "changes": [] if fork is None else [*fork.changes],
            "created": None if fork is None else fork.timestamp,
            "learned": count_learned(branches.files_of(self._folder, name)),
            "alive": child is not None and child.alive(),
            "restarts": 0 if child is None else child.restarts,
            "against_served": None if pair is None else pair.describe(),
        }

    def look(self, elapsed: float) -> tuple[tuple[str, ProcessFacts], ...]:
        """Return the facts about each background process, ``elapsed`` seconds after the last look."""
        with self._lock:
            return tuple((name, monitor.look(elapsed)) for name, monitor in self._monitors.items())

    def ask_to_stop(self) -> None:
        """Let the background processes drain, and start no other; return at once."""
        with self._lock:
            self._closing.set()
            children = [*self._background.values(), *self._children.values()]
        for child in children:
            child.ask_to_stop()

    def close(self, seconds: Callable[[], float]) -> None:
        """Stop the background processes within ``seconds()``; the served ones have ended already."""
        self.ask_to_stop()
        for child in [*self._background.values()]:
            child.stop(seconds())
        self._ended.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._ended.is_set():
            seconds = POLL_SECONDS
            try:
                if not self._closing.is_set():
                    self._refresh()
            except Exception:
                log.exception("the forks of the run cannot be followed; retrying in %.0f s", RETRY_SECONDS)
                seconds = RETRY_SECONDS
            self._wake.wait(seconds)
            self._wake.clear()

    def _refresh(self) -> None:
        """Follow the log: serve what was promoted, and play every other branch."""
        with self._changing:
            self._branches = branches = read_branches(self._folder)
            if branches.served != self.served:
                self._apply(prepare_branch(self._config, branches))
        if self._running is not self._settled:
            self._move_processes()
        for name in branches.dropped:
            if name in self._background or RunFiles(self._folder, name).own.exists():
                self._forget(name)
        for name in branches.list_names():
            if name not in (self.served, *self._background):
                self._play(name)
        pairs = self._pairs
        for name in self._background:
            if name not in pairs:
                pairs[name] = self._pair(name)
            pairs[name].refresh()

    def _forget(self, name: str) -> None:
        """Stop the process of a fork that was dropped, and remove its folder."""
        with self._lock:
            child = self._background.pop(name, None)
            self._monitors.pop(name, None)
            self._pairs.pop(name, None)
        if child is not None:
            child.stop(self._stop_seconds)
        shutil.rmtree(RunFiles(self._folder, name).own, ignore_errors=True)
        log.info("the fork %s is dropped", name)

    def _apply(self, prepared: Prepared) -> None:
        """Serve the prepared branch: from here on, every answer is its own."""
        self._switch(prepared)
        with self._lock:
            self._settled, self._branches, self._pairs = prepared.settled, read_branches(self._folder), {}
        write_branches(prepared.settled)
        log.info("%s is served from now on", prepared.name)

    def _play(self, name: str) -> None:
        """Start the background process of a branch, unless the daemon drains."""
        files = self._branches.files_of(self._folder, name)
        write_branches(settle_branches(self._config, self._branches))
        reset_heartbeat(files.heartbeat("trainer"))
        with self._lock:
            if not self._closing.is_set():
                child = start_child("trainer", self._config, files, partial(_note_broken, name), BACKGROUND)
                self._background[name] = child
                count = partial(getattr, child, "restarts")
                self._monitors[name] = ProcessMonitor(files.heartbeat("trainer"), lambda: child, count)

    def _pair(self, name: str) -> PairedLosses:
        """Return what compares a branch with the served one, from the first round with other settings on."""
        settings, served = settle_branches(self._config, self._branches).settings, self.served
        mine, theirs = (settings[one].answers or find_player(settings[one], None) for one in (name, served))
        files = (self._branches.files_of(self._folder, name), self._settled.files)
        return PairedLosses(files, (mine, theirs), self._branches.find_parting(name, served))

    def _move_processes(self) -> None:
        """Give the served branch processes of a served one; the previous one continues in the background."""
        settled, before = self._settled, self._children["trainer"]
        name = settled.files.branch or MAIN
        with self._lock:
            background = self._background.pop(name, None)
            self._monitors.pop(name, None)
        if background is not None:
            background.stop(self._stop_seconds)
        if (comparators := self._children.get("comparators")) is not None:
            comparators.stop(self._stop_seconds)
        for kind in ("trainer", "comparators"):
            reset_heartbeat(settled.files.heartbeat(kind))
        with self._lock:
            if self._closing.is_set():
                return
            if settled.config.regret.comparator:
                self._children["comparators"] = start_child("comparators", settled.config, settled.files)
            else:
                self._children.pop("comparators", None)
            self._children["trainer"] = start_child("trainer", settled.config, settled.files, self._on_broken)
            self._follow(settled)
        before.stop(self._stop_seconds)
        link_leader(self._folder, self._branches)  # The old trainer may have published there until now.
        self._running = settled


def _note_broken(name: str) -> None:
    log.error("the fork %s cannot continue; see its last messages above", name)
