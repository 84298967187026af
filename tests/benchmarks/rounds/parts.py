"""The parts of the benchmark: each is measured, and returns its times and figures."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from online_meta.replay import generator
from online_meta.types import Task
from streams.history.history import History
from streams.sources.sinusoid import make_task
from tests.benchmarks.race import describe_spread
from tests.benchmarks.ranks import time_ranks
from tests.benchmarks.rounds.cold import SETTLED, Start, time_jax, time_replay
from tests.benchmarks.rounds.game import find_difference, save_order
from tests.benchmarks.rounds.kernels import profile_rounds
from tests.benchmarks.rounds.page import Figure
from tests.benchmarks.rounds.players import (
    WARM_UP,
    WARM_UPS,
    JaxPlayer,
    Losses,
    OurPlayer,
    make_order,
    read_settings,
    take_turns,
)
from tests.benchmarks.works import image_task
from tests.experiments.pool_cost import LONE, SIDE, WORKS
from tests.experiments.round_cost.page import compute_growth
from tests.experiments.round_cost.runs import (
    call_in_new_process,
    count_catching_up,
    make_settings,
    make_state,
    time_rounds,
)
from tests.support.runs import fill
from trainers.loop.run import Run

ALONE = ("regret.comparator=[]", *LONE)
"""FTML alone."""
GAMES = {
    "k1": ("inner.steps=1", "meta.batch=25", "meta.steps_per_round=1"),
    "k5": ("inner.steps=5", "meta.batch=10", "meta.steps_per_round=5"),
}
TITLES = {"k1": "K = 1, 25 tasks, 1 step", "k5": "K = 5, 10 tasks, 5 steps"}
DRAWN, TOLERANCE = 5, 1e-4
"""Losses are compared up to this round after the first one that draws what it revisits, for rounding adds up at kinks;
and the largest relative difference of the losses."""
DEMO_TASK = (10, 1, 2)
"""Classes, support images and query images of a class, as in the demo."""
STOCHASTIC, DETERMINISTIC = ("platipus", "bayes_by_gradient"), "sgd"
"""Rules that draw all weights, in the first step and in each one, and the rule without draws."""
LEAST_ROWS, MOST_ROWS = 14, 67
"""Rows of a task of varying size, support and query set together."""
POLICY = "uniform"
COMMIT = 1000

Log = Callable[[str], None]
Part = dict[str, Any]


class Scale(NamedTuple):
    """How much is measured.

    Attributes:
        turns: of players in turns.
        rounds: in a turn.
        pool_rounds: in a turn of the pool.
        images: in a turn of the pool on images.
        starts: fresh processes of each kind.
        first: rounds of a fresh process.
        sized: rounds of a fresh process on tasks of varying size.
        late: the late round.
    """

    turns: int = 10
    rounds: int = 100
    pool_rounds: int = 25
    images: int = 3
    starts: int = 3
    first: int = 500
    sized: int = 300
    late: int = 100_000


QUICK = Scale(turns=3, rounds=25, pool_rounds=5, images=1, starts=1, first=60, sized=60, late=2_000)


class Setting(NamedTuple):
    """What a part needs: the scale, a folder for its files, a log, and an interpreter with DeepSpeed."""

    scale: Scale
    folder: Path
    log: Log
    python: str = sys.executable


def make_history(folder: Path, tasks: Iterable[Task]) -> Path:
    """Return the folder of a new history with the tasks."""
    left = iter(tasks)
    with History.open(folder, write=True) as history:
        while some := [*islice(left, COMMIT)]:
            fill(history, some)
    return folder


def make_sinusoids(folder: Path, rounds: int) -> Path:
    """Return a new history with sinusoids of ten support and ten query points."""
    return make_history(folder / "history", (make_task(0, t, 10, 10) for t in range(rounds)))


def compare_turns(
    title: str, about: Sequence[str], seconds: dict[str, list[float]], what: str, goal: float, wrong: str = ""
) -> Part:
    """Return a part whose figure is the ratio of the first player's time to that of the second."""
    ours, theirs = seconds.values()
    ratio, spread = describe_spread([one / other for one, other in zip(ours, theirs, strict=True)])
    figure = Figure(what, ratio, goal, spread=spread if len(ours) > 1 else None, wrong=wrong)
    return {"title": title, "about": [*about], "rows": list_rows(seconds), "figures": [figure._asdict()]}


def list_rows(seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Return the rows of a table: the median and the spread of each player's seconds."""
    rows = []
    for name, taken in seconds.items():
        middle, spread = describe_spread(taken)
        rows.append({"what": name, "seconds": middle, "spread": spread, "raw": taken})
    return rows


def describe_losses(ours: Losses, theirs: Losses, batch: int) -> tuple[str, str]:
    """Return a sentence that compares the losses, and why times may not be compared; empty if they may."""
    compared = batch + DRAWN
    difference = find_difference([*ours[:compared]], [*theirs[:compared]])
    means = [fmean(after for _, after in losses) for losses in (ours, theirs)]
    about = (
        f"Losses of the first {compared} rounds differ by {difference:.1e} at most, relatively. The mean loss of all "
        f"{len(ours)} rounds is {means[0]:.4f}, and {means[1]:.4f} in JAX."
    )
    return about, "" if difference <= TOLERANCE else f"JAX plays another game: losses differ by {difference:.1e}"


def measure_rounds(game: str, goal: float, setting: Setting) -> Part:
    """Play rounds in turns with JAX, after the programs of both have been compiled."""
    scale, folder = setting.scale, setting.folder
    settings = read_settings((*GAMES[game], *ALONE))
    rounds = WARM_UP * WARM_UPS + scale.turns * scale.rounds
    history = make_sinusoids(folder, rounds)
    with (
        OurPlayer(settings, history, folder / "run") as ours,
        JaxPlayer(make_order(settings, ours, history, rounds)) as jax,
    ):
        setting.log("programs are compiled")
        jax.turn(WARM_UP * WARM_UPS)
        ours.warm_up()
        seconds = take_turns({"ours": ours.turn, "JAX": jax.turn}, scale.turns, scale.rounds, setting.log)
        about, wrong = describe_losses(ours.read_losses(), jax.losses, settings.meta.batch)
        batching = ours.read_batching()
    title = f"Rounds in turns: {TITLES[game]}"
    text = [about, f"Our meta-gradients are summed as: {', '.join(batching.values()) or 'loop'}."]
    return compare_turns(title, text, seconds, f"ms a round / JAX: {TITLES[game]}", goal, wrong)


def measure_pool(name: str, overrides: Sequence[str], title: str, goal: float, setting: Setting) -> Part:
    """Play rounds with the default pool in turns with FTML alone; ``name`` is that of a work of the pool's cost."""
    players = {"default pool": tuple(overrides), "FTML alone": (*overrides, *LONE)}
    seconds, runs = play_in_turns(name, players, setting)
    learners = len(runs["default pool"].learners)
    about = [f"The pool mixes the answers of the {learners} learners that play by default, itself counted."]
    return compare_turns(f"The default pool: {title}", about, seconds, f"default pool / FTML alone: {title}", goal)


def measure_draws(name: str, overrides: Sequence[str], title: str, goal: float, setting: Setting) -> Part:
    """Play rounds with rules that draw weights in turns with gradient descent, FTML alone."""
    players = {rule: (*overrides, *LONE, f"inner.rule={rule}") for rule in (*STOCHASTIC, DETERMINISTIC)}
    seconds, _ = play_in_turns(name, players, setting)
    figures = []
    for rule in STOCHASTIC:
        ratio, spread = describe_spread([a / b for a, b in zip(seconds[rule], seconds[DETERMINISTIC], strict=True)])
        figures.append(Figure(f"{rule} / {DETERMINISTIC}: {title}", ratio, goal, spread=spread)._asdict())
    about = [f"{', '.join(f'`{rule}`' for rule in STOCHASTIC)} draw weights by key, and `{DETERMINISTIC}` draws none."]
    return {"title": f"Rules that draw: {title}", "about": about, "rows": list_rows(seconds), "figures": figures}


def play_in_turns(
    name: str, players: Mapping[str, Sequence[str]], setting: Setting
) -> tuple[dict[str, list[float]], dict[str, Run]]:
    """Let configurations of a work play in turns; return the seconds of a round in each turn, and their runs."""
    scale, folder, work = setting.scale, setting.folder, WORKS[name]
    rounds, warm_up, warm_ups = (scale.images, 3, 1) if work.ways else (scale.pool_rounds, WARM_UP, WARM_UPS)
    tasks = work._replace(rounds=warm_up * warm_ups + scale.turns * rounds).make()
    history = make_history(folder / "history", tasks)
    with ExitStack() as stack:
        playing = {
            label: stack.enter_context(
                OurPlayer(read_settings((*work.overrides, *overrides), work.file), history, folder / f"{place}")
            )
            for place, (label, overrides) in enumerate(players.items())
        }
        for player in playing.values():
            setting.log("programs are compiled")
            player.warm_up(warm_up, warm_ups)
        turns = {label: player.turn for label, player in playing.items()}
        seconds = take_turns(turns, scale.turns, rounds, setting.log)
        return seconds, {label: player.run for label, player in playing.items()}


def measure_kernels(goal: float, setting: Setting) -> Part:
    """Profile rounds of the demo's work, FTML alone: what is not in torch's operations and programs."""
    scale, folder = setting.scale, setting.folder
    rounds = WARM_UP * 2 + scale.turns * scale.images
    history = make_history(folder / "history", (image_task(*DEMO_TASK, seed, SIDE) for seed in range(rounds)))
    settings = read_settings(ALONE, "demo.toml")
    with OurPlayer(settings, history, folder / "run") as player:
        player.warm_up(times=2)
        setting.log("programs are compiled")
        shares = []
        for number in range(scale.turns):
            setting.log(f"turn {number + 1} of {scale.turns}")
            shares.append(profile_rounds(player.turn, scale.images))
        batching = player.read_batching()
    share, spread = describe_spread([one.outside for one in shares])
    seconds = {
        "a round, profiled": [one.seconds for one in shares],
        "of it in operations and programs": [one.inside for one in shares],
    }
    about = [f"FTML alone. Meta-gradients are summed as: {', '.join(batching.values()) or 'loop'}."]
    figure = Figure("share of a round outside of torch's operations: demo's Conv4", share, goal, spread=spread)
    return {"title": "Kernels", "about": about, "rows": list_rows(seconds), "figures": [figure._asdict()]}


def measure_first_rounds(game: str, goal: float, setting: Setting) -> Part:
    """Time the first rounds of fresh processes, cold: ours and JAX take turns."""
    scale, folder, overrides = setting.scale, setting.folder, (*GAMES[game], *ALONE)
    history, file = make_sinusoids(folder, scale.first), folder / "order.npz"
    settings = read_settings(overrides)
    with OurPlayer(settings, history, folder / "run") as player:
        save_order(file, make_order(settings, player, history, scale.first))
    found: dict[str, list[Start]] = {"ours": [], "JAX": []}
    for number in range(scale.starts):
        setting.log(f"start {number + 1} of {scale.starts}")
        found["ours"].append(time_replay(overrides, history, scale.first))
        found["JAX"].append(time_jax(file, scale.first))
    about, wrong = describe_losses(found["ours"][0].losses, found["JAX"][0].losses, settings.meta.batch)
    walls = {name: [start.wall for start in starts] for name, starts in found.items()}
    title = f"the first {scale.first} rounds, cold: {TITLES[game]}"
    text = ["`online-meta replay` and JAX from the start of the process to its end; nothing is cached.", about]
    part = compare_turns(title.capitalize().replace("k =", "K ="), text, walls, f"{title} / JAX", goal, wrong)
    slowest, spread = describe_spread([start.slowest for start in found["ours"]])
    what = f"slowest round after the first {SETTLED} / median, cold: {TITLES[game]}"
    part["figures"].append(Figure(what, slowest, 10.0, spread=spread)._asdict())
    starts = {name: {"wall": starts[0].wall, "rounds": starts[0].rounds} for name, starts in found.items()}
    return {**part, "game": game, "starts": starts}


def measure_late_rounds(goal: float, setting: Setting) -> Part:
    """Time rounds of runs that stand at round 100 and at a late one, as ``make experiments-cost`` does."""
    work, late = setting.folder, setting.scale.late
    rounds, block = (100, late), 25
    for name in ("states", "copies"):
        (work / name).mkdir()
    more = 2 * (setting.scale.turns + 2) * block + count_catching_up(late)
    make_sinusoids(work, late + more)
    settings = make_settings(POLICY, LONE)
    for before, round in ((0, 100), (100, late)):
        setting.log(f"a run at round {round}")
        call_in_new_process(make_state, work, POLICY, settings, round, before, before == 0)
    setting.log("rounds at both")
    times = call_in_new_process(time_rounds, work, POLICY, settings, rounds, setting.scale.turns, block)
    growth = compute_growth(times, "cpu")
    what = f"ms a round at round {late:,} / round 100"
    figure = Figure(what, growth.ratios[-1], goal, spread=2 * growth.ranges[-1] / growth.ratios[-1])
    seconds = {f"round {row['round']:,}": row["cpu"] for row in times}
    about = [
        "Processor time; the run at the late round was fast-forwarded to it, see [the cost of a round](cost.md).",
        f"After a start, all its tasks are stacked within {count_catching_up(late)} rounds, which are not counted.",
    ]
    return {"title": "Late rounds", "about": about, "rows": list_rows(seconds), "figures": [figure._asdict()]}


def measure_sizes(goal: float, setting: Setting) -> Part:
    """Time cold rounds on tasks of varying size, next to tasks of their mean size."""
    scale, random = setting.scale, generator(0)
    sizes = [int(random.integers(LEAST_ROWS, MOST_ROWS + 1)) for _ in range(scale.sized)]
    one = round(fmean(sizes))
    varying = f"{LEAST_ROWS} to {MOST_ROWS} rows a task"
    histories = {
        name: make_history(
            setting.folder / f"{place}", [make_task(0, t, n // 2, n - n // 2) for t, n in enumerate(own)]
        )
        for place, (name, own) in enumerate({varying: sizes, f"{one} rows a task": [one] * len(sizes)}.items())
    }
    seconds: dict[str, list[float]] = {name: [] for name in histories}
    for number in range(scale.starts):
        setting.log(f"start {number + 1} of {scale.starts}")
        for name, history in histories.items():
            seconds[name].append(sum(time_replay((*GAMES["k5"], *ALONE), history, scale.sized).rounds))
    about = [f"The seconds of {scale.sized} rounds of `online-meta replay` in a fresh process, without its imports."]
    what = f"{scale.sized} rounds of {varying} / the same at one size: {TITLES['k5']}"
    return compare_turns("Varying sizes", about, seconds, what, goal)


def measure_ranks(goal: float, setting: Setting) -> Part:
    """Time rounds of two DeepSpeed ranks in turns with those of one rank that has half the tasks."""
    scale, folder = setting.scale, setting.folder
    ways = {"2 ranks, 10 tasks": (2, 10), "1 rank, 5 tasks": (1, 5)}
    times, turns = scale.starts, max(1, scale.turns // 3)
    history = make_sinusoids(folder, WARM_UP * WARM_UPS + turns * scale.rounds)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(times):
        for name, (world, batch) in ways.items():
            setting.log(f"{number + 1} of {times}: {name}")
            arguments = [history, folder / f"{number}-{world}", batch, scale.rounds, turns]
            command = [setting.python, "-m", "tests.benchmarks.rounds.one_rank", *map(str, arguments)]
            seconds[name].append(describe_spread(time_ranks(command, world))[0])
    two, one = seconds.values()
    ratio, spread = describe_spread([theirs / ours for ours, theirs in zip(two, one, strict=True)])
    what = "rounds/s of 2 ranks / 1 rank with half the tasks, DeepSpeed at stage 0"
    figure = Figure(what, ratio, goal, at_least=True, spread=spread)
    about = ["Each rank has a core of its own and one thread. K = 5, 5 steps."]
    return {"title": "Two ranks", "about": about, "rows": list_rows(seconds), "figures": [figure._asdict()]}
