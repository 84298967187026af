"""Games of experts that try to break the bounds of ``online_meta.aggregation``."""

import math
import random

import torch

import online_meta.aggregation
from online_meta import registry

ENTRIES = {name: registry.load(online_meta.aggregation, name) for name in registry.names(online_meta.aggregation)}
LOW, HIGH = -1.0, 2.0
OPTIONS = {"exp_concave": {"low": LOW, "high": HIGH}, "fixed_share": {"switches": 2}}


def make(name, **options):
    """Return an aggregation of the registry, with options that the games fit."""
    return ENTRIES[name](**{**OPTIONS.get(name, {}), **options})


def log_loss(weights, losses):
    """Return the log loss of the mixture of densities exp(-losses)."""
    return -online_meta.aggregation.log_sum_exp(
        [math.log(weight) - loss if weight > 0 else -math.inf for weight, loss in zip(weights, losses, strict=True)]
    )


def _squared(weights, points, scale):
    """Experts predict points of the range; the target is the last point, or an end of the range."""
    *predictions, target = [LOW + (HIGH - LOW) * point for point in points]
    mean = math.fsum(weight * one for weight, one in zip(weights, predictions, strict=True))
    return [(one - target) ** 2 for one in predictions], (mean - target) ** 2


def _log(weights, points, scale):
    losses = [scale * (point - 0.3) for point in points[:-1]]
    return losses, log_loss(weights, losses)


def _linear(weights, points, scale):
    losses = [scale * (point - 0.3) for point in points[:-1]]
    return losses, math.fsum(weight * loss for weight, loss in zip(weights, losses, strict=True))


def _unit(weights, points, scale):
    return points[:-1], math.fsum(weight * point for weight, point in zip(weights, points[:-1], strict=True))


GAMES = {
    "bayes": _log,
    "fixed_share": _log,
    "exp_concave": _squared,
    "adahedge": _linear,
    "tracking": _linear,
    "squint": _unit,
}
"""(weights, N + 1 points of [0, 1], scale) -> the losses of the experts, and that of their aggregate."""


def play(name, aggregation, sequence, count, scale=1.0):
    """Return the largest (regret - bound) / scale over the rounds of a game.

    ``sequence`` yields the points of each round, or gives them by a function of the round and the weights.
    """
    state, worst = aggregation.init(count), -math.inf
    largest = 1.0
    for point in sequence:
        weights = aggregation.weights(state).tolist()
        losses, loss = GAMES[name](weights, point(weights) if callable(point) else point, scale)
        largest = max(largest, *map(abs, losses))
        state = aggregation.update(state, torch.tensor(losses, dtype=torch.float64), loss)
        worst = max(worst, (aggregation.regret(state) - aggregation.bound(state)) / largest)
    return worst


def sequences(count, rounds, seed=0):
    """Return sequences of points in [0, 1], by name, that are hard for one algorithm or another."""
    draw = random.Random(seed)

    def one_hot(place, high=1.0, low=0.0):
        return [high if i == place else low for i in range(count)] + [low]

    def at_heaviest(weights):
        return one_hot(max(range(count), key=weights.__getitem__))

    def at_lightest_only(weights):
        return [*one_hot(min(range(count), key=weights.__getitem__), 0.0, 1.0)[:-1], 0.0]

    def at_half_of_the_weight(weights):
        order, hit, points = sorted(range(count), key=weights.__getitem__), 0.0, [0.0] * (count + 1)
        for place in order:
            if hit + weights[place] <= 0.6:
                points[place], hit = 1.0, hit + weights[place]
        return points

    period = max(rounds // 5, 1)
    return {
        "alternating leaders": [one_hot(t % count) for t in range(rounds)],
        "alternating winners": [[*one_hot(t % count, 0.0, 1.0)[:-1], 0.0] for t in range(rounds)],
        "all equal": [[0.7] * count + [0.1]] * rounds,
        "one good expert": [[*one_hot(0, 0.0, 1.0)[:-1], 0.0]] * rounds,
        "one bad expert": [one_hot(0)] * rounds,
        "one good expert late": [[0.5] * (count + 1)] * (rounds // 2)
        + [[*one_hot(count - 1, 0.0, 1.0)[:-1], 0.0]] * (rounds // 2),
        "the leader changes": [[*one_hot((t // period) % count, 0.0, 1.0)[:-1], 0.0] for t in range(rounds)],
        "against the heaviest": [at_heaviest] * rounds,
        "for the lightest": [at_lightest_only] * rounds,
        "against half of the weight": [at_half_of_the_weight] * rounds,
        "random": [[draw.random() for _ in range(count + 1)] for _ in range(rounds)],
        "random ends": [[float(draw.random() < 0.5) for _ in range(count + 1)] for _ in range(rounds)],
        "rare and large": [
            [draw.random() ** 20 for _ in range(count)] + [float(draw.random() < 0.5)] for _ in range(rounds)
        ],
    }


def hunt(name, aggregation, rounds=160, scales=(1.0, 30.0)):
    """Yield, for each game, the largest (regret - bound) / scale and what was played."""
    for count in (2, 5):
        for title, sequence in sequences(count, rounds).items():
            for scale in scales if name in ("bayes", "fixed_share") else scales[:1]:
                yield play(name, aggregation, sequence, count, scale), (title, count, scale)
        yield climb(name, aggregation, count), ("climbed", count, 1.0)


def climb(name, aggregation, count, rounds=12, tries=30):
    """Return the largest (regret - bound) that random changes of a short sequence reach."""
    draw = random.Random(count)
    best = [[draw.random() for _ in range(count + 1)] for _ in range(rounds)]
    value = play(name, aggregation, best, count)
    for _ in range(tries):
        changed = [
            [draw.choice([0.0, 1.0, draw.random()]) if draw.random() < 0.2 else one for one in row] for row in best
        ]
        reached = play(name, aggregation, changed, count)
        if reached >= value:
            best, value = changed, reached
    return value


def with_rate(aggregation, factor):
    """Return the aggregation with weights proportional to w^factor: a learning rate that is wrong by this factor."""

    def weights(state):
        logs = [math.log(weight) if weight > 0 else -math.inf for weight in aggregation.weights(state).tolist()]
        return online_meta.aggregation.weights_of([factor * value for value in logs])

    return aggregation._replace(weights=weights)
