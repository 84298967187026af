"""Online meta-learning where all is known by algebra: tasks whose losses are strongly convex quadratics.

Of task t, f̂_t(w) = (w - a_t)' A_t (w - a_t) / 2 is the loss on the support set, f_t(w) = (w - b_t)' B_t (w - b_t) / 2
that on the query set. One inner step U_t(w) = w - alpha A_t (w - a_t) gives U_t(w) - b_t = M_t (w - c_t) with
M_t = I - alpha A_t and c_t = M_t^-1 (b_t - alpha A_t a_t), so the loss after adaptation is a quadratic again:

    F_t(w) = f_t(U_t(w)) = (w - c_t)' H_t (w - c_t) / 2,   H_t = M_t' B_t M_t.

With A_t <= beta I, B_t >= mu I and alpha <= 1 / (2 beta), M_t lies between I / 2 and I, so F_t is (mu / 4)-strongly
convex: more than the mu / 8 that theorem 1 of Finn et al. (ICML 2019) promises for losses whose Hessian may vary.

The bound. Let S_t = F_1 + .. + F_t, let w_{t+1} minimise S_t, as FTML does, and S_0 = 0. Since S_t(w_t) =
S_{t-1}(w_t) + F_t(w_t), summing F_t(w_t) telescopes:

    regret_T = sum_t F_t(w_t) - S_T(w_{T+1}) = sum_t (S_t(w_t) - S_t(w_{t+1})).

S_t is (t mu~)-strongly convex where every F_k is mu~-strongly convex, so that S_t(w_t) - min S_t is at most
|S_t'(w_t)|^2 / (2 t mu~); and S_t'(w_t) = F_t'(w_t), for w_t minimises S_{t-1} (S_1 is F_1). With |F_t'(w_t)| <= G~:

    regret_T <= sum_t G~^2 / (2 mu~ t) <= G~^2 / (2 mu~) (1 + log T).

Both constants carry over from those of f: G~ <= G, for F_t'(w) = M_t' f_t'(U_t(w)) and M_t <= I, and mu~ >= mu / 8
in general, so the slope is at most 4 G^2 / mu. The paper states the order, O(G^2 / mu log T).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Quadratics(NamedTuple):
    """A stream of T tasks of d weights: ``support`` A and ``query`` B (T, d, d), their minima a and b (T, d), alpha."""

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
    # Steep tasks lie elsewhere than flat ones, so that what an inner step does to the gradient matters.
    towards, common = (each / np.linalg.norm(each) for each in random.standard_normal((2, weights)))
    centres = 3 * common + 2 * steep[:, None] * towards + random.uniform(-1.0, 1.0, (rounds, weights))
    apart = random.uniform(-0.5, 0.5, (rounds, weights))
    return Quadratics(matrices(steep), centres, matrices(other), centres + apart, alpha)


def adapt_all(tasks: Quadratics) -> MetaLosses:
    """Return each task's loss as a function of the weights before its inner step."""
    maps = np.eye(tasks.support.shape[1]) - tasks.alpha * tasks.support
    pulls = tasks.query_minima - tasks.alpha * _times(tasks.support, tasks.support_minima)
    return MetaLosses(maps @ tasks.query @ maps, np.asarray(np.linalg.solve(maps, pulls[..., None])[..., 0]))


def lead(losses: MetaLosses, start: Array) -> Array:
    """Return w_1 .. w_{T+1}, (T + 1, d): what FTML plays, ``start`` first, each argmin of the sum of all before it."""
    curvature, pull = losses.curvature.cumsum(0), _times(*losses).cumsum(0)
    return np.concatenate([start[None], np.linalg.solve(curvature, pull[..., None])[..., 0]])


def suffer(losses: MetaLosses, played: Array) -> Array:
    """Return F_t(w_t), (T,), for weights ``played``, (T, d), or one (d,) for all rounds."""
    apart = played - losses.minima
    return np.asarray(0.5 * (apart * _times(losses.curvature, apart)).sum(1))


def best_sums(losses: MetaLosses) -> Array:
    """Return min_w sum_{t<=T} F_t(w) for each T, (T,): the comparator in closed form."""
    leaders = lead(losses, losses.minima[0])[1:]
    pull = _times(*losses).cumsum(0)
    constant = 0.5 * (losses.minima * _times(*losses)).sum(1).cumsum()
    return np.asarray(constant - 0.5 * (leaders * pull).sum(1))


def regret(losses: MetaLosses, played: Array) -> Array:
    """Return the regret after each round, (T,), of weights ``played``, (T, d) or (d,)."""
    return np.asarray(suffer(losses, played).cumsum() - best_sums(losses))


def bound_slope(losses: MetaLosses, played: Array) -> float:
    """Return G~^2 / (2 mu~), of log T in the bound, with the largest gradient and least curvature that were met."""
    steepest = np.linalg.norm(_times(losses.curvature, played - losses.minima), axis=1).max()
    return float(steepest**2 / (2 * np.linalg.eigvalsh(losses.curvature).min()))


def expected_slope(losses: MetaLosses) -> float:
    """Return tr(H^-1 E[g g']) / 2, the slope of FTML's regret against log T for tasks that are drawn independently.

    H is the mean curvature, g the gradients at the best weights: w_t is off by a covariance of H^-1 E[g g'] H^-1 / t,
    and the expected loss by half of that, weighed by H.
    """
    best = lead(losses, losses.minima[0])[-1]
    gradients = _times(losses.curvature, best - losses.minima)
    spread = gradients.T @ gradients / len(gradients)
    return float(np.trace(np.linalg.solve(losses.curvature.mean(0), spread)) / 2)


def _times(matrices: Array, vectors: Array) -> Array:
    """Return each matrix times its vector, (T, d)."""
    return np.asarray((matrices @ vectors[..., None])[..., 0])
