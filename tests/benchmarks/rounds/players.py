"""What plays the rounds of a history in turns: the system in this process, and JAX in another one."""

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files as package_files
from pathlib import Path
from threading import Event
from time import perf_counter

from deploy.config.config import read_config
from online_meta.answers import unpack_meta
from streams.history.history import History
from tests.benchmarks.jax_peer import JaxProcess, list_arrays
from tests.benchmarks.rounds.game import Game, Order
from trainers.distributed.ranks import RankGroup
from trainers.journal.jsonl import Line, LineReader
from trainers.journal.run_files import RunFiles
from trainers.loop.rounds import open_run, play_rounds
from trainers.loop.run import close_run
from trainers.settings import TrainerSettings

SINUSOID = "sinusoid.toml"
LAYERS = {"1": "0", "3": "2", "5": "4"}
"""The layers of the network of ``sinusoid.toml``, and of the same one in ``jax_networks``."""
JAX_PROGRAM = "tests.benchmarks.rounds.jax_ftml"
WARM_UP, WARM_UPS = 25, 4
"""Rounds before each wait for programs that are being compiled, and how often that is done before rounds are timed."""

AT_ONCE = 0.0
"""Programs are compiled as soon as their shapes recur, and not after seconds of computing: the rounds are few."""

Turn = Callable[[int], float]
"""Plays further rounds, and returns the mean seconds of one."""
Losses = list[tuple[float, float]]
"""The loss of each round before and after adapting."""


def locate_config(name: str) -> Path:
    """Return a configuration in the package ``deploy``."""
    return Path(str(package_files("deploy"))) / name


def read_settings(overrides: Sequence[str], config: str = SINUSOID) -> TrainerSettings:
    """Return the settings of a configuration in the package ``deploy``, with changes."""
    return read_config(locate_config(config), tuple(overrides)).trainer()


def describe_game(settings: TrainerSettings) -> Game:
    """Return what JAX has to know of the settings."""
    inner, meta = settings.inner, settings.meta
    assert meta.clip_norm is not None
    return Game(
        int(inner.steps),
        float(inner.lr),
        meta.batch,
        meta.steps_per_round,
        float(meta.lr),
        meta.clip_norm,
        settings.seed,
    )


class OurPlayer:
    """A new run on a history, as a daemon or a replay plays it, in this process."""

    def __init__(
        self, settings: TrainerSettings, history: Path, folder: Path, rank_group: RankGroup | None = None
    ) -> None:
        """Open the run in ``folder``, at round 0; as one of several ranks if there is a group of them."""
        self._files = RunFiles(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._history = History.open(history, write=False)
        self.run = open_run(settings, self._files, self._history, AT_ONCE, rank_group)
        self.weights = {
            name: value.clone() for name, value in unpack_meta(self.run.answering.learner.state()).weights.items()
        }

    def __enter__(self) -> "OurPlayer":
        return self

    def __exit__(self, *error: object) -> None:
        """Close the run and the history."""
        close_run(self.run)
        self._history.close()

    def turn(self, rounds: int) -> float:
        """Play further rounds, and return the mean seconds of one."""
        began = perf_counter()
        play_rounds(self.run, Event(), self.run.round + rounds)
        return (perf_counter() - began) / rounds

    def warm_up(self, rounds: int = WARM_UP, times: int = WARM_UPS) -> None:
        """Play further rounds, and wait until no program is being compiled for them, several times."""
        for _ in range(times):
            self.turn(rounds)
            self.run.plan_selector.wait()

    def read_losses(self) -> Losses:
        """Return the losses of all rounds that are recorded."""
        return read_losses(LineReader(self._files.rounds).lines())

    def read_batching(self) -> dict[str, str]:
        """Return how each learner sums meta-gradients by now."""
        assert self.run.journal is not None
        plans = self.run.journal.execution_plan_log.at(self.run.round - 1)
        return {name: ", ".join(sorted({plan.batching for plan in own})) for name, own in plans.items()}


def read_losses(lines: Iterable[Line]) -> Losses:
    """Return the losses in the records of rounds."""
    return [(line["loss_before"], line["loss_after"]) for line in lines]


def make_order(settings: TrainerSettings, player: OurPlayer, history: Path, rounds: int) -> Order:
    """Return the same game for JAX: on the first ``rounds`` tasks of the history, from the player's first weights."""
    with History.open(history, write=False) as tasks:
        arrays = list_arrays([*tasks.tasks(range(rounds))])
    weights = {}
    for name, value in player.weights.items():
        layer, _, part = name.partition(".")
        weights[f"{LAYERS[layer]}.{part}"] = value.numpy()
    return Order(describe_game(settings), weights, arrays)


class JaxPlayer(JaxProcess):
    """The game in plain JAX, in a child process."""

    def __init__(self, order: Order) -> None:
        """Start at round 0."""
        super().__init__(order, JAX_PROGRAM)
        self.losses: Losses = []

    def __enter__(self) -> "JaxPlayer":
        return self

    def turn(self, rounds: int) -> float:
        """Play further rounds, and return the mean seconds of one, measured by the child."""
        seconds, losses = self.ask(rounds)
        self.losses += losses
        return float(seconds)


def take_turns(
    turns: Mapping[str, Turn], count: int, rounds: int, log: Callable[[str], None]
) -> dict[str, list[float]]:
    """Let all play ``rounds`` rounds in each of ``count`` turns, and return the seconds of a round in each turn."""
    found: dict[str, list[float]] = {name: [] for name in turns}
    names = [*turns]
    for number in range(count):
        log(f"turn {number + 1} of {count}")
        gc.collect()
        for place in range(len(names)):
            name = names[(place + number) % len(names)]
            found[name].append(turns[name](rounds))
    return found
