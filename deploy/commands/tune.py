"""online-meta tune: look for better settings on the rounds of a history, within a budget of time."""

import json
import math
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from threading import Event
from typing import Any, NamedTuple

import click
import numpy as np

from deploy.checks.preflight import check_learning
from deploy.checks.run_folder import check_tasks
from deploy.commands._programs import share_programs
from deploy.commands.replay import copy_logs
from deploy.config.config import Config, config_file_context, read_config
from deploy.config.describe import format_toml
from deploy.exits import CONFIG, TRY_LATER, CommandError
from online_meta import registry
from online_meta.regret.differences import MIN_ROUNDS, Differences, confidence_sequence
from online_meta.regret.racing import add_difference, goes_on, list_prefixes
from streams.history.history import History
from streams.history.retention import count_discarded
from streams.private_files import private_umask
from trainers.journal.divergence import Diverged
from trainers.journal.jsonl import Line, LineReader, LineWriter
from trainers.journal.quarantine import TooManyQuarantined
from trainers.journal.run_files import RunFiles
from trainers.learner_settings import STEPPING_KEYS, list_learners, steps_by_meta
from trainers.loop.recovery import RepeatFailed
from trainers.loop.rounds import open_run, play_rounds
from trainers.loop.run import close_run
from trainers.settings import PoolSettings
from trainers.settings_fingerprint import fingerprint

LEAST_ROUNDS = 10
"""The shortest prefix that trials are compared on."""
HELD_OUT = 0.25
"""The share of the rounds, at the end, that decides and that no search sees."""
TAIL_RESERVE = 2.0
"""The search leaves this many times as long as the current settings took for the rounds that decide."""
FLOAT_RANGE, LEAST_WHOLE, WHOLE_RANGE = 30.0, 10, 4
"""A number is looked for up to ``FLOAT_RANGE`` times below and above its value; a whole one from 1 to ``WHOLE_RANGE``
times its value, or to ``LEAST_WHOLE`` if that is more."""
MEASURE_AFTER = 60.0
"""A trial compiles faster programs only after this many seconds of meta-gradients: most trials are too short for it."""
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
Dimension = tuple[float, float, bool]
"""Where to look for a setting: its least and its largest value, and whether it is a whole number."""
Values = dict[str, float]
"""Settings to try: "section.key" -> a number."""


@dataclass
class Trial:
    """Settings that are tried.

    Attributes:
        number: of the trial; 0 are the current settings.
        values: what it sets.
        means: the mean loss over each prefix that it has played, in nats or squared units of y, by its length.
        ended: why it plays no further: "behind" the others, or an error; None while it may.
    """

    number: int
    values: Values
    means: dict[int, float] = field(default_factory=dict)
    ended: str | None = None


class Tuned(NamedTuple):
    """What was found.

    Attributes:
        trials: all of them; the first has the current settings.
        best: of the others, the one with the smallest mean loss over the first ``compared`` rounds; None if there is
            none.
        compared: the longest prefix that another trial than the current settings has played; 0 for none.
        searched: the number of rounds that the search may see; those after them decide.
        rounds: how many of those the current settings and the best trial have both played.
        means: their mean losses there; None for no rounds.
        interval: for the mean of "loss of the best minus loss of the current settings" there; None for too few rounds.
        interrupted: whether the search was ended before its time.
    """

    trials: list[Trial]
    best: Trial | None
    compared: int
    searched: int
    rounds: int = 0
    means: tuple[float, float] | None = None
    interval: tuple[float, float] | None = None
    interrupted: bool = False

    @property
    def is_promising(self) -> bool:
        """Whether the best trial had a smaller mean loss than the current settings where the search compared them."""
        return self.best is not None and self.best.means[self.compared] < self.trials[0].means[self.compared]

    @property
    def is_better(self) -> bool:
        """Whether the rounds that decide show that the best trial is better than the current settings."""
        return self.interval is not None and self.interval[1] < 0

    @property
    def values(self) -> Values:
        """The values to use: those of the best trial if it is better, or was best when there was no time to decide."""
        take = self.is_better or (self.is_promising and not self.rounds)
        return (self.best if take and self.best else self.trials[0]).values


class Deadline(Event):
    """An event that is set at a time, too. Times are those of ``clock``, in seconds."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Set the event after ``seconds``."""
        super().__init__()
        self.clock, self.at = clock, clock() + seconds

    def is_set(self) -> bool:
        """Return whether the time has come, or the event was set."""
        return super().is_set() or self.clock() >= self.at


def read_duration(text: str) -> float:
    """Return the seconds of a duration such as "90s", "10m" or "2h". Raises ``click.BadParameter`` for others."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if not found or not float(found[1]):
        raise click.BadParameter(f"{text!r} is no duration: write a number and s, m or h, such as 90s, 10m or 2h")
    return float(found[1]) * UNITS[found[2]]


@click.command("tune")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--history", type=click.Path(path_type=Path), help="History to play; by default that of the run.")
@click.option("--budget", default="10m", show_default=True, help="How long it may take, such as 90s, 10m or 2h.")
@click.option(
    "--keys",
    default="inner.lr,inner.steps,meta.lr",
    show_default=True,
    help="What to look for: numbers of [inner] and [meta].",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the trials; by default RUN/tune.")
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override one value of the file.")
@click.option("--json", "as_json", is_flag=True, help="Print what was found as one JSON object.")
def command(
    config: Path,
    history: Path | None,
    budget: str,
    keys: str,
    out: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Look for better learning rates and numbers of steps on a history, and print them as TOML.

    Settings are tried on growing parts of the history; the worse ones stop early. The last quarter of the rounds, which
    the search does not see, decides whether the best ones are better than those of the file. Ctrl-C ends the search
    early; the same command again continues it.
    """
    settings, seconds = share_programs(read_config(config, overrides)), read_duration(budget)
    files = RunFiles(Path(settings.run.path))
    with config_file_context(config), private_umask():
        stop = Deadline(seconds)
        with stop_on_interrupt(stop):
            names, report = [key.strip() for key in keys.split(",")], partial(click.echo, err=True)
            found = tune(settings, history or files.history, out or files.folder / "tune", names, stop, report)
    click.echo(json.dumps(describe(found)) if as_json else format_found(found, settings))


@contextmanager
def stop_on_interrupt(stop: Event) -> Iterator[None]:
    """Let the first Ctrl-C in the block set ``stop``, and the second one end the process as usual."""
    before = signal.getsignal(signal.SIGINT)

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, before)
        stop.set()

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def tune(
    config: Config,
    history_folder: Path,
    out: Path,
    keys: list[str],
    stop: Deadline,
    report: Callable[[str], None] = lambda text: None,
) -> Tuned:
    """Search settings on a history by successive halving, and compare the best with the current ones.

    The current settings play all rounds. Each other trial plays the prefixes of ``list_prefixes``; after each it
    ``goes_on`` or ends. Optuna's tree-structured Parzen estimator suggests what to try next; without optuna, the values
    are drawn at random, uniform in the logarithm. Either is a function of the seed and the trials so far.

    Args:
        config: the current settings.
        history_folder: of the history to play.
        out: folder for the trials, from which a later call continues.
        keys: "section.key" of the numbers to look for.
        stop: ends the search.
        report: called with a line of progress.

    Raises:
        CommandError: for a key that cannot be tuned, too short a history, or trials of other settings in ``out``.
    """
    with History.open(history_folder, write=False) as history:
        check_tasks(history, config.task, history_folder)
        if discarded := count_discarded(history.query):
            raise CommandError(CONFIG, f"{history_folder}: retention has removed {discarded} rounds that tuning needs")
        check_learning(_lead_alone(config))
        search = Search(config, history, (history_folder, out), keys)
        try:
            return search.run(stop, report)
        finally:
            search.log.close()


class Search:
    """The trials on a history, and their log; see ``tune``."""

    def __init__(self, config: Config, history: History, folders: tuple[Path, Path], keys: list[str]) -> None:
        """Continue the trials in the second of the ``folders``, or begin; the first one is that of the history."""
        self.config, self.history, (self.history_folder, self.out) = config, history, folders
        current = read_values(config, keys)
        self.space = {key: make_dimension(value) for key, value in current.items()}
        lines = LineReader(self.out / "trials.jsonl").refresh()
        own = {"settings": fingerprint(_lead_alone(config).trainer()), "keys": keys}
        if lines and {key: lines[0].get(key) for key in own} != own:
            raise CommandError(CONFIG, f"{self.out} has trials of other settings or keys: name another folder by --out")
        self.rounds = lines[0]["rounds"] if lines else len(history)
        self.searched = self.rounds - int(self.rounds * HELD_OUT)
        if self.rounds > len(history):
            raise CommandError(TRY_LATER, f"{self.out} has trials on {self.rounds} rounds, this history {len(history)}")
        if self.searched < 2 * LEAST_ROUNDS:
            least = math.ceil(2 * LEAST_ROUNDS / (1 - HELD_OUT))
            raise CommandError(
                TRY_LATER, f"{self.history_folder} has {self.rounds} rounds: tuning needs {least} or more"
            )
        self.rungs = list_prefixes(self.searched, LEAST_ROUNDS)
        self.log = LineWriter(self.out / "trials.jsonl")
        if not lines:
            self.log.append({**own, "rounds": self.rounds})
        self.trials = read_trials(lines[1:])
        if not self.trials:
            self._add(current)

    def run(self, stop: Deadline, report: Callable[[str], None]) -> Tuned:
        """Play the current settings, search until the time is up, and compare."""
        self.stop, self.report = stop, report
        current = self.trials[0]
        self._climb(current)
        if not current.ended:
            self._play(current, self.rounds)
        if current.ended:
            raise CommandError(CONFIG, f"the current settings cannot be played: {current.ended}")
        seconds = sum(line["seconds"] for line in self._lines(current, self.searched, self.rounds))
        end = stop.at - TAIL_RESERVE * seconds
        for trial in self.trials[1:]:
            self._climb(trial)
        while not stop.is_set() and stop.clock() < end:
            self._climb(self._add(suggest(self.trials, self.space, self.config.run.seed)))
        best, compared = find_best(self.trials)
        found = Tuned(self.trials, best, compared, self.searched)
        if best is not None and compared == self.searched and found.is_promising:
            self._play(best, self.rounds)
            found = self._compare(found, best)
        return found._replace(interrupted=stop.is_set() and stop.clock() < stop.at)

    def _add(self, values: Values) -> Trial:
        trial = Trial(len(self.trials), values)
        self.log.append({"trial": trial.number, "values": values})
        self.trials.append(trial)
        return trial

    def _climb(self, trial: Trial) -> None:
        """Play the prefixes of the search one after another, until the trial is behind or the time is up."""
        for rung in self.rungs:
            if trial.ended or (rung not in trial.means and not self._play(trial, rung)):
                return
            if rung not in trial.means:
                losses = [read_loss(line) for line in self._lines(trial, 0, rung)]
                trial.means[rung] = sum(losses) / max(len(losses), 1)
                self.log.append({"trial": trial.number, "rounds": rung, "mean": trial.means[rung]})
                mean = f"mean loss {trial.means[rung]:.6g} over {rung} rounds"
                self.report(f"trial {trial.number}: {mean} with {join_values(trial.values)}")
                means = [one.means[rung] for one in self.trials if rung in one.means]
                if trial.number and not goes_on(trial.means[rung], means):
                    self._end(trial, "behind")

    def _end(self, trial: Trial, why: str) -> None:
        trial.ended = why
        self.log.append({"trial": trial.number, "ended": why})
        shutil.rmtree(self._folder(trial), ignore_errors=True)

    def _folder(self, trial: Trial) -> Path:
        return self.out / str(trial.number)

    def _play(self, trial: Trial, until: int) -> bool:
        """Play a trial up to a round; return whether it got there. One that fails has ended."""
        files = RunFiles(self._folder(trial))
        copy_logs(self.history_folder, files)
        try:
            settings = set_values(_lead_alone(self.config), trial.values).trainer()
            run = open_run(settings, files, self.history, MEASURE_AFTER)
            try:
                return until <= run.round or play_rounds(run, self.stop, until) >= until
            finally:
                close_run(run)
        except (Diverged, RepeatFailed, TooManyQuarantined, ValueError) as error:
            self._end(trial, str(error))
            return False

    def _lines(self, trial: Trial, first: int, end: int) -> list[Line]:
        """Return the records of the rounds ``first`` .. ``end`` - 1 that a trial has learned."""
        lines = LineReader(RunFiles(self._folder(trial)).rounds).lines()
        return [line for line in lines if line["skipped"] is None and first <= line["round"] < end]

    def _compare(self, found: Tuned, best: Trial) -> Tuned:
        """Compare the best trial with the current settings on the rounds after the search that both have played."""
        ends = (self.searched, self.rounds)
        own, other = (
            {line["round"]: read_loss(line) for line in self._lines(trial, *ends)} for trial in (self.trials[0], best)
        )
        common = [round for round in own if round in other]
        if not common:
            return found
        differences = Differences(0, 0.0, 0.0)
        for round in common:
            differences = add_difference(differences, other[round] - own[round])
        means = fmean(own[round] for round in common), fmean(other[round] for round in common)
        return found._replace(rounds=len(common), means=means, interval=confidence_sequence(differences))


def read_loss(line: Line) -> float:
    """Return the loss of the first learner in the record of a round, or what one that is not finite is charged at."""
    result = next(iter(line["learners"].values()))
    return float(result["charged"] if result["loss_after"] is None else result["loss_after"])


def _lead_alone(config: Config) -> Config:
    """Return the configuration with the leading learner alone, which answers."""
    regret = replace(config.regret, baselines=(), comparator=(), prefixes=(), proficiency=None)
    inner = replace(config.inner, answer_steps=())
    serve = replace(config.serve, answers=None)
    alone = {"learner": list_learners(config)[:1], "pool": PoolSettings(), "race": (), "defaults": ()}
    return replace(config, **alone, regret=regret, inner=inner, serve=serve)  # type: ignore[arg-type]


def read_values(config: Config, keys: list[str]) -> Values:
    """Return the current values of settings. Raises ``CommandError`` for one that is no number of [inner] or [meta]."""
    leader = list_learners(config)[0]
    numbers = {
        f"{section}.{name}": getattr(leader, section).get(name, value)
        for section in ("inner", "meta")
        for name, value in vars(getattr(config, section)).items()
        if type(value) in (int, float) and value > 0
    }
    for key in keys:
        if key not in numbers:
            raise CommandError(CONFIG, f"--keys {key}: only numbers can be tuned; {registry.nearest(key, numbers)}")
        if key in {f"meta.{name}" for name in STEPPING_KEYS} and not steps_by_meta(leader, leads=True):
            raise CommandError(CONFIG, f"--keys {key}: the options of {leader.name} say how it steps, not [meta]")
    return {key: numbers[key] for key in keys}


def make_dimension(value: float) -> Dimension:
    """Return where to look for a setting that has this ``value`` now."""
    if isinstance(value, int):
        return 1, max(LEAST_WHOLE, WHOLE_RANGE * value), True
    return value / FLOAT_RANGE, value * FLOAT_RANGE, False


def set_values(config: Config, values: Values) -> Config:
    """Return the configuration with other values, also where the leading learner has a value of its own."""
    for key, value in values.items():
        section, name = key.split(".")
        leader, *others = list_learners(config)
        if name in getattr(leader, section):
            own: dict[str, Any] = {section: {**getattr(leader, section), name: value}}
            leader = replace(leader, **own)
            config = replace(config, learner=(leader, *others))
        else:
            config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config


def read_trials(lines: list[Line]) -> list[Trial]:
    """Return the trials of a log."""
    trials: list[Trial] = []
    for line in lines:
        if "values" in line:
            trials.append(Trial(line["trial"], line["values"]))
        elif "mean" in line:
            trials[line["trial"]].means[line["rounds"]] = line["mean"]
        else:
            trials[line["trial"]].ended = line["ended"]
    return trials


def find_best(trials: list[Trial]) -> tuple[Trial | None, int]:
    """Return the best trial but the first on the longest prefix that one of them has played, and its length."""
    longest = max((rung for one in trials[1:] for rung in one.means), default=0)
    played = [one for one in trials[1:] if longest in one.means]
    return min(played, key=lambda one: one.means[longest], default=None), longest


def suggest(trials: list[Trial], space: Mapping[str, Dimension], seed: int) -> Values:
    """Return what to try next; a function of the arguments."""
    try:
        import optuna
    except ImportError:
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, len(trials)])))
        return {
            key: (round if whole else float)(low * (high / low) ** random.uniform())
            for key, (low, high, whole) in space.items()
        }
    from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions: dict[str, BaseDistribution] = {
        key: IntDistribution(int(low), int(high), log=True) if whole else FloatDistribution(low, high, log=True)
        for key, (low, high, whole) in space.items()
    }
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed + len(trials)))
    for one in trials:
        if one.means:
            state = TrialState.PRUNED if one.ended else TrialState.COMPLETE
            last = one.means[max(one.means)]
            known = {"params": one.values, "distributions": distributions, "intermediate_values": one.means}
            study.add_trial(create_trial(state=state, value=last, **known))  # type: ignore[arg-type]
    return dict(study.ask(distributions).params)


def join_values(values: Values) -> str:
    """Return settings in one line."""
    return ", ".join(f"{key} = {value:.4g}" for key, value in values.items())


def describe(found: Tuned) -> dict[str, Any]:
    """Return what was found as a JSON value."""
    known = ("searched", "compared", "rounds", "means", "interval", "interrupted")
    counts = {"trials": len(found.trials) - 1, **{key: getattr(found, key) for key in known}}
    return {"better": found.is_better, "values": found.values, "current": found.trials[0].values, **counts}


def format_found(found: Tuned, config: Config) -> str:
    """Return what was found as TOML, with comments that say how well it is known."""
    lines = [f"# {line}" for line in explain(found)]
    leader = list_learners(config)[0]
    for section in ("inner", "meta"):
        own = {key.split(".")[1]: value for key, value in found.values.items() if key.startswith(f"{section}.")}
        if own.keys() & getattr(leader, section).keys():
            lines.append(f"# The table of the learner {leader.name!r} has values of its own: set these there.")
        if own:
            lines += [f"[{section}]", *(f"{name} = {format_toml(value)}" for name, value in own.items())]
    return "\n".join(lines)


def explain(found: Tuned) -> Iterator[str]:
    """Yield sentences on how the values were found, and how well it is known that they are better."""
    count = len(found.trials) - 1
    ended = ", ended by Ctrl-C" if found.interrupted else ""
    yield f"{count} {'trial' if count == 1 else 'trials'} on {found.searched} rounds{ended}."
    if found.best is None or not found.is_promising:
        yield "Nothing that was tried beats the current settings, which follow."
        return
    mean, current = found.best.means[found.compared], found.trials[0].means[found.compared]
    over = f"over the first {found.compared} rounds, {mean:.6g} against {current:.6g}"
    if found.means is None:
        yield f"The best so far, by its mean loss {over} with the current settings."
        yield "No later rounds have decided yet: the same command with more time continues."
        return
    if not found.is_better:
        yield "Nothing that was tried is shown to beat the current settings, which follow."
        yield f"The best on the rounds of the search ({over}): {join_values(found.best.values)}."
    yield (
        f"On {found.rounds} later rounds, which the search did not see: mean loss {found.means[1]:.6g} "
        f"{'with these settings' if found.is_better else 'with those'}, {found.means[0]:.6g} with the current ones."
    )
    if found.interval is None:
        yield f"There is no interval for the difference with fewer than {MIN_ROUNDS} rounds."
    else:
        low, high = found.interval
        yield f"The difference is between {low:.3g} and {high:.3g} (95 %, whenever one looks)."
