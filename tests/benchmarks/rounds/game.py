"""The game that both programs play, as plain data, and the rounds that it revisits. It needs NumPy alone."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Game(NamedTuple):
    """FTML with uniform replay on sinusoids: the perceptron 1-40-40-1, inner steps of SGD, meta-steps of Adam.

    Attributes:
        inner_steps: inner steps on a task.
        inner_lr: their learning rate.
        batch: past rounds in a meta-step, at most.
        meta_steps: meta-steps after each round.
        meta_lr: their learning rate.
        clip_norm: the largest global norm of a meta-gradient.
        seed: the seed of the draws.
    """

    inner_steps: int
    inner_lr: float
    batch: int
    meta_steps: int
    meta_lr: float
    clip_norm: float
    seed: int


class Order(NamedTuple):
    """What JAX plays: the game, the weights that it starts with, and the stacked arrays of all tasks."""

    game: Game
    weights: dict[str, np.ndarray]
    tasks: tuple[np.ndarray, ...]


def save_order(file: Path, order: Order) -> None:
    """Write an order to an .npz file."""
    named = {f"weights.{name}": value for name, value in order.weights.items()}
    named |= {f"tasks.{part}": value for part, value in enumerate(order.tasks)}
    np.savez(file, game=np.array(json.dumps(order.game)), **named)


def load_order(file: Path) -> Order:
    """Return the order that ``save_order`` wrote."""
    with np.load(file) as saved:
        weights = {name.removeprefix("weights."): saved[name] for name in saved if name.startswith("weights.")}
        tasks = tuple(saved[f"tasks.{part}"] for part in range(4))
        return Order(Game(*json.loads(str(saved["game"]))), weights, tasks)


def draw_rounds(game: Game, round: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rounds that a meta-step after ``round`` revisits, and their shares; both have shape (batch,).

    These are distinct past rounds, this one included, drawn uniformly, and all of them while they fit into a batch. The
    shares sum to 1; what fills up a batch has share 0.
    """
    picked, shares = np.zeros(game.batch, np.int32), np.zeros(game.batch, np.float32)
    if round < game.batch:
        picked[: round + 1], shares[: round + 1] = np.arange(round + 1), 1 / (round + 1)
        return picked, shares
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence((game.seed, round, step))))
    chosen: dict[int, None] = {}
    while len(chosen) < game.batch:
        chosen[int(random.integers(round + 1))] = None
    picked[:], shares[:] = [*chosen], 1 / game.batch
    return picked, shares


def find_difference(ours: list[Any], theirs: list[Any]) -> float:
    """Return the largest relative difference of two lists of losses; infinity if one is not finite or is missing."""
    one, other = (np.asarray(losses, np.float64) for losses in (ours, theirs))
    if one.shape != other.shape or not one.size or not np.isfinite([one, other]).all():
        return float("inf")
    return float((np.abs(one - other) / np.maximum(np.abs(other), 1e-6)).max())
