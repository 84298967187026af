"""Compute regret on strongly convex quadratics; it grows like log T for FTML, and like T for fixed weights."""

import time
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from deploy.reports.report import as_png
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from tests.experiments.common.tables import Row, format_mean, read_command, read_commit, write_files

Array = NDArray[np.float64]


class Quadratics(NamedTuple):
    """T tasks with d weights: ``support`` A and ``query`` B (T, d, d), their minima a and b (T, d), and ``alpha``."""

    support: Array
    support_minima: Array
    query: Array
    query_minima: Array
    alpha: float


class MetaLosses(NamedTuple):
    """The losses after adaptation, F_t(w) = (w - c_t)' H_t (w - c_t) / 2: ``curvature`` H, ``minima`` c."""

    curvature: Array
    minima: Array


def draw_quadratics(rounds: int, weights: int, seed: int, alpha: float = 0.25) -> Quadratics:
    """Return a stream of distinct tasks, all eigenvalues between mu = 0.5 and beta = 2; ``alpha`` <= 1 / (2 beta)."""
    random = np.random.default_rng(seed)
    low, high = 0.5, 2.0

    def matrices(levels: Array) -> Array:
        bases = np.linalg.qr(random.standard_normal((rounds, weights, weights)))[0]
        values = np.clip(levels[:, None, None] * random.uniform(0.8, 1.25, (rounds, 1, weights)), low, high)
        return np.asarray((bases * values) @ bases.transpose(0, 2, 1))

    steep, other = random.uniform(low, high, (2, rounds))
    # The minima depend on the steepness, so that the effect of an inner step on the gradient matters.
    towards, common = (each / np.linalg.norm(each) for each in random.standard_normal((2, weights)))
    centres = 3 * common + 2 * steep[:, None] * towards + random.uniform(-1.0, 1.0, (rounds, weights))
    apart = random.uniform(-0.5, 0.5, (rounds, weights))
    return Quadratics(matrices(steep), centres, matrices(other), centres + apart, alpha)


def adapt_all(tasks: Quadratics) -> MetaLosses:
    """Return each task's loss as a function of the weights before its inner step."""
    maps = np.eye(tasks.support.shape[1]) - tasks.alpha * tasks.support
    pulls = tasks.query_minima - tasks.alpha * _multiply(tasks.support, tasks.support_minima)
    return MetaLosses(maps @ tasks.query @ maps, np.asarray(np.linalg.solve(maps, pulls[..., None])[..., 0]))


def compute_leaders(losses: MetaLosses, start: Array) -> Array:
    """Return w_1 .. w_{T+1}, (T + 1, d), the weights of FTML: ``start``, then w_{t+1} = argmin_w sum_{s<=t} F_s(w)."""
    curvature, pull = losses.curvature.cumsum(0), _multiply(*losses).cumsum(0)
    return np.concatenate([start[None], np.linalg.solve(curvature, pull[..., None])[..., 0]])


def compute_losses(losses: MetaLosses, played: Array) -> Array:
    """Return F_t(w_t), (T,), for weights ``played``, (T, d), or one (d,) for all rounds."""
    apart = played - losses.minima
    return np.asarray(0.5 * (apart * _multiply(losses.curvature, apart)).sum(1))


def minimise_prefix_sums(losses: MetaLosses) -> Array:
    """Return min_w sum_{t<=T} F_t(w) for each T, (T,): the comparator in closed form."""
    leaders = compute_leaders(losses, losses.minima[0])[1:]
    pull = _multiply(*losses).cumsum(0)
    constant = 0.5 * (losses.minima * _multiply(*losses)).sum(1).cumsum()
    return np.asarray(constant - 0.5 * (leaders * pull).sum(1))


def compute_regret(losses: MetaLosses, played: Array) -> Array:
    """Return the regret after each round, (T,), of weights ``played``, (T, d) or (d,)."""
    return np.asarray(compute_losses(losses, played).cumsum() - minimise_prefix_sums(losses))


def compute_bound_slope(losses: MetaLosses, played: Array) -> float:
    """Return G~^2 / (2 mu~), the factor of log T in the bound, from the largest gradient and the smallest curvature."""
    steepest = np.linalg.norm(_multiply(losses.curvature, played - losses.minima), axis=1).max()
    return float(steepest**2 / (2 * np.linalg.eigvalsh(losses.curvature).min()))


def compute_expected_slope(losses: MetaLosses) -> float:
    """Return tr(H^-1 E[g g']) / 2, the slope of FTML's regret over log T for independent tasks.

    H is the mean curvature, and g are the gradients at the best weights. The error of w_t has the covariance
    H^-1 E[g g'] H^-1 / t, so the expected excess loss is half the trace of H times this covariance.
    """
    best = compute_leaders(losses, losses.minima[0])[-1]
    gradients = _multiply(losses.curvature, best - losses.minima)
    spread = gradients.T @ gradients / len(gradients)
    return float(np.trace(np.linalg.solve(losses.curvature.mean(0), spread)) / 2)


def _multiply(matrices: Array, vectors: Array) -> Array:
    """Return each matrix times its vector, (T, d)."""
    return np.asarray((matrices @ vectors[..., None])[..., 0])


NAME = "regret_theory"


WEIGHTS = 5


LEAST, MOST = 100, 10_000


POINTS = 60


def fit_line(x: ArrayLike, y: ArrayLike) -> tuple[float, float, float]:
    """Return slope, intercept and R^2 of the least-squares line."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    slope, intercept = np.polyfit(x, y, 1)
    left = np.square(y - slope * x - intercept).sum()
    return float(slope), float(intercept), float(1 - left / np.square(y - y.mean()).sum())


def choose_rounds(most: int) -> list[int]:
    """Return the values of T for the fits, evenly spaced in log T."""
    return [*np.unique(np.geomspace(LEAST, most, POINTS).round().astype(int)).tolist()]


def run_seed(seed: int, rounds: int) -> Row:
    """Return the curves and fits of one stream; regret at round T is index T - 1."""
    losses = adapt_all(draw_quadratics(rounds, WEIGHTS, seed))
    start = np.zeros(WEIGHTS)
    played = compute_leaders(losses, start)[:-1]
    shown = choose_rounds(rounds)
    ftml, fixed = compute_regret(losses, played), compute_regret(losses, start)
    at = np.array(shown) - 1
    slope, _, straight = fit_line(np.log(shown), ftml[at])
    return {
        "seed": seed,
        "rounds": shown,
        "ftml": ftml[at].tolist(),
        "fixed": fixed[at].tolist(),
        "slope": slope,
        "straight": straight,
        "expected": compute_expected_slope(losses),
        "bound": compute_bound_slope(losses, played),
        "kept": _is_below(ftml, compute_bound_slope(losses, played)),
        "fixed_slope": fit_line(shown, fixed[at])[0],
        "fixed_straight": fit_line(shown, fixed[at])[2],
    }


def _is_below(found: Array, slope: float) -> bool:
    """Return whether the regret is within the bound after every round."""
    return bool((found <= slope * (1 + np.log(np.arange(1, len(found) + 1)))).all())


def render(result: dict[str, Any]) -> str:
    """Return the table as Markdown."""
    rows = result["rows"]
    last = rows[0]["rounds"][-1]

    def cell(key: str, digits: int = 3) -> str:
        return format_mean([row[key] for row in rows], f".{digits}f")

    return f"""# Regret in theory

`{result["command"]}`, commit {result["commit"]}, {result["wall_seconds"]:.1f} seconds.

Streams of {last:,} distinct strongly convex quadratics of {WEIGHTS} weights with one inner step. Everything has a
closed form: the leader that FTML plays, and the best weights in hindsight, which are the comparator. The derivation,
with that of the bound, is in `tests/experiments/regret_theory.py`. Mean over {len(rows)} streams ± standard error.
Lines are least-squares fits to {len(rows[0]["rounds"])} values of T from {LEAST} to {last:,}, evenly spaced in log T.

| | FTML, against log T | fixed weights, against T |
|---|---|---|
| slope of the regret | {cell("slope")} | {cell("fixed_slope")} |
| R² of the line | {cell("straight", 4)} | {cell("fixed_straight", 6)} |
| expected slope for independent tasks | {cell("expected")} | |
| slope of the bound, G²/(2 mu) | {cell("bound", 1)} | |
| regret within the bound in every round of every stream | {"yes" if all(row["kept"] for row in rows) else "NO"} | |

The bound uses the largest gradient and the smallest curvature of the stream, so it is far above the actual regret.

![Regret of FTML and of fixed weights]({NAME}.png)
"""


def plot(rows: list[Row]) -> bytes:
    """Return a PNG: FTML's regret against T on a log axis, with the bound; both learners on two log axes."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    shown = np.array(rows[0]["rounds"])
    for row in rows:
        left.plot(shown, row["ftml"], color="#3182bd", alpha=0.5, linewidth=1)
        for name, colour in (("ftml", "#3182bd"), ("fixed", "#e6862d")):
            right.plot(shown, row[name], color=colour, alpha=0.5, linewidth=1)
    left.plot(shown, np.mean([row["ftml"] for row in rows], 0), color="#08519c", label="FTML, mean")
    left.set(xscale="log", xlabel="T", ylabel="regret", title="FTML: a straight line in log T")
    bound = max(row["bound"] for row in rows) * (1 + np.log(shown))
    right.plot(shown, bound, color="black", linestyle=":", label="bound of FTML")
    right.plot([], [], color="#3182bd", label="FTML")
    right.plot([], [], color="#e6862d", label="fixed weights")
    right.set(xscale="log", yscale="log", xlabel="T", ylabel="regret", title="FTML, its bound, and fixed weights")
    left.legend()
    right.legend()
    return as_png(figure, dpi=110)


@click.command()
@click.option("--seeds", default=20, show_default=True, help="Number of streams, starting at seed 0.")
@click.option("--rounds", default=MOST, show_default=True, help="Length of each stream, more than 100.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs/results"), show_default=True)
def main(seeds: int, rounds: int, out: Path) -> None:
    """Write regret_theory.json, .md and .png into OUT; takes seconds."""
    if rounds <= LEAST or seeds < 1:
        raise click.BadParameter(
            f"--rounds is {rounds} and --seeds is {seeds}; they must be more than {LEAST} and at least 1"
        )
    began = time.monotonic()
    rows = [run_seed(seed, rounds) for seed in range(seeds)]
    command = read_command(f"tests.experiments.{NAME}")
    result = {"command": command, "commit": read_commit(), "wall_seconds": time.monotonic() - began, "rows": rows}
    write_files(out, NAME, result, render(result), plot(rows))
    click.echo((out / f"{NAME}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
