"""The game in plain JAX. ``python -m tests.benchmarks.rounds.jax_ftml FILE ROUNDS`` plays it in a fresh process."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tests.benchmarks.jax_networks import query_loss
from tests.benchmarks.rounds.game import Game, Order, draw_rounds, load_order

DECAY, SQUARE_DECAY, EPSILON = 0.9, 0.999, 1e-8
"""Adam's constants (Kingma and Ba, ICLR 2015)."""


class State(NamedTuple):
    """The weights, Adam's two moments of the gradient, and the number of steps."""

    weights: Any
    first: Any
    second: Any
    steps: Any


class Player:
    """FTML: two jitted functions, and the tasks as stacked arrays."""

    def __init__(self, order: Order) -> None:
        """Start at round 0; the first round compiles."""
        self.game, self.round = order.game, 0
        weights = {name: jnp.asarray(value) for name, value in order.weights.items()}
        zeros = jax.tree.map(jnp.zeros_like, weights)
        self.state = State(weights, zeros, zeros, jnp.zeros(()))
        self.tasks = tuple(map(jnp.asarray, order.tasks))
        self.score, self.step = make_score(order.game), make_step(order.game)

    def play_round(self) -> tuple[float, float]:
        """Score the next task before and after adapting to it, then learn; return both losses."""
        before, after = self.score(self.state.weights, self.tasks, self.round)
        for step in range(self.game.meta_steps):
            self.state = self.step(self.state, self.tasks, *draw_rounds(self.game, self.round, step))
        self.round += 1
        return float(before), float(after)


def make_score(game: Game) -> Any:
    """Return (weights, tasks, round) -> the losses of the round's task before and after adapting to it."""
    before, after = (query_loss("sinusoid_mlp", "mse", game.inner_lr, steps) for steps in (0, game.inner_steps))

    @jax.jit
    def score(weights: Any, tasks: Any, round: Any) -> tuple[Any, Any]:
        task = [part[round] for part in tasks]
        return before(weights, *task), after(weights, *task)

    return score


def make_step(game: Game) -> Any:
    """Return (state, tasks, picked rounds, their shares) -> the state after a meta-step of Adam."""
    after = query_loss("sinusoid_mlp", "mse", game.inner_lr, game.inner_steps)

    def mean_loss(weights: Any, tasks: Any, picked: Any, shares: Any) -> Any:
        return jax.vmap(after, (None, 0, 0, 0, 0))(weights, *(part[picked] for part in tasks)) @ shares

    @jax.jit
    def step(state: State, tasks: Any, picked: Any, shares: Any) -> State:
        grads = jax.grad(mean_loss)(state.weights, tasks, picked, shares)
        norm = jnp.sqrt(sum(jnp.sum(grad**2) for grad in jax.tree.leaves(grads)))
        grads = jax.tree.map(lambda grad: grad * jnp.minimum(1.0, game.clip_norm / (norm + 1e-12)), grads)
        steps = state.steps + 1
        first = jax.tree.map(lambda old, grad: DECAY * old + (1 - DECAY) * grad, state.first, grads)
        second = jax.tree.map(lambda old, grad: SQUARE_DECAY * old + (1 - SQUARE_DECAY) * grad**2, state.second, grads)

        def move(weight: Any, mean: Any, square: Any) -> Any:
            size = jnp.sqrt(square / correct(SQUARE_DECAY, steps)) + EPSILON
            return weight - game.meta_lr * mean / correct(DECAY, steps) / size

        return State(jax.tree.map(move, state.weights, first, second), first, second, steps)

    return step


def correct(decay: float, steps: Any) -> Any:
    """Return 1 - decay^steps without the rounding error of a small difference in float32."""
    return -jnp.expm1(steps * math.log(decay))


def prepare(order: Order) -> tuple[Player, None]:
    """Return the player for ``jax_child.serve``."""
    return Player(order), None


def run(player: Player, rounds: int) -> tuple[float, list[tuple[float, float]]]:
    """Play further rounds; return the mean seconds of a round, and the losses of each before and after adapting."""
    began = time.perf_counter()
    losses = [player.play_round() for _ in range(rounds)]
    jax.block_until_ready(player.state)
    return (time.perf_counter() - began) / rounds, losses


def main(file: Path, rounds: int) -> None:
    """Play the order in ``file``, and print the seconds of each round and the losses."""
    player = Player(load_order(file))
    played = [run(player, 1) for _ in range(rounds)]
    print(json.dumps({"seconds": [seconds for seconds, _ in played], "losses": [loss for _, (loss,) in played]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
