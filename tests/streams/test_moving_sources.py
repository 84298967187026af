"""Non-stationary streams draw task t as their settings say."""

import math
from dataclasses import replace

import numpy as np
import pydantic
import pytest

import streams.sources
from online_meta.registry import load_module
from online_meta.replay import generator
from streams.formats import wire
from streams.sources import drifting_sinusoids, heavy_tailed_functions, recurring_functions
from streams.sources._synthetic import FAMILIES, MAX_PARAMETERS, random_walk, reflect, sample_task

DRIFT, RECUR, HEAVY = drifting_sinusoids.Settings(), recurring_functions.Settings(), heavy_tailed_functions.Settings()

MODELS = {
    "sinusoid": lambda x: [np.sin(x), np.cos(x)],
    "line": lambda x: [x, x**0],
    "quadratic": lambda x: [x**2, x, x**0],
    "cubic": lambda x: [x**3, x**2, x, x**0],
}
"""The basis functions of each family; its functions are their weighted sums."""


def points(task):
    return tuple(np.concatenate([batch[k].double().numpy()[:, 0] for batch in task]) for k in (0, 1))


def fit(family, task):
    """Return the weights of the best fit of a family to a task, and the largest remaining error."""
    x, y = points(task)
    columns = np.stack(MODELS[family](x), 1)
    weights = np.linalg.lstsq(columns, y, rcond=None)[0]
    return weights, float(np.abs(columns @ weights - y).max())


def amplitude(task):
    weights, error = fit("sinusoid", task)
    assert error < 1e-5
    return float(np.hypot(*weights))


@pytest.mark.parametrize("motion", ["cycle", "walk"])
def test_amplitudes_fill_the_window_of_each_task(motion):
    settings = replace(DRIFT, motion=motion, period=40.0, step=0.3)
    tasks = {t: drifting_sinusoids.make_task(settings, 3, t) for t in range(160)}
    places = [
        (amplitude(task) - drifting_sinusoids.lowest_amplitude(settings, 3, t)) / 0.5 for t, task in tasks.items()
    ]
    assert -1e-4 <= min(places) < 0.05
    assert 0.95 < max(places) <= 1 + 1e-4
    assert abs(np.mean(places) - 0.5) < 0.1


def test_a_cycle_starts_at_the_bottom_and_peaks_after_half_a_period():
    settings = replace(DRIFT, period=40.0, width=0.9)
    low = [drifting_sinusoids.lowest_amplitude(settings, 3, t) for t in range(100)]
    assert [low[t] for t in (0, 10, 20, 40, 60)] == pytest.approx([0.1, 2.1, 4.1, 0.1, 4.1])
    assert low[:60] == pytest.approx(low[40:])
    assert np.all(np.diff(low[:21]) > 0)


def test_the_window_of_a_walk_moves_by_the_step_and_stays_inside():
    settings = replace(DRIFT, motion="walk", step=0.4)
    low = np.array([drifting_sinusoids.lowest_amplitude(settings, 1, t) for t in range(400)])
    assert low.min() >= 0.1
    assert low.max() <= 4.5
    assert low.max() - low.min() > 2
    inside = (low[:-1] > 1.7) & (low[:-1] < 2.9)  # three steps from the ends, where few steps are reflected
    assert np.diff(low)[inside].std() == pytest.approx(0.4, rel=0.2)
    others = [drifting_sinusoids.lowest_amplitude(settings, seed, 0) for seed in range(20)]
    assert np.std(others) > 0.5, "each seed starts at another place"


def test_a_walk_has_independent_normal_steps():
    steps = np.array([np.diff([random_walk(seed, 1, t=t) for t in range(33)]) for seed in range(60)])
    assert random_walk(0, 1, t=0) == 0
    assert abs(steps.mean()) < 0.1
    assert steps.std() == pytest.approx(1.0, abs=0.05)
    assert steps.std(axis=0).min() > 0.7, "the variance is 1 at all times"
    correlations = np.corrcoef(steps.T) - np.eye(32)
    assert abs(correlations).max() < 0.55
    assert correlations.std() < 0.16, "1 / sqrt(60) is 0.13"
    assert np.var(steps.sum(1)) == pytest.approx(32, rel=0.6)


def test_a_random_walk_is_computed_directly_at_any_time():
    far = 10**6 - 3
    places = [random_walk(5, 1, t=far + k) for k in range(200)]
    assert np.diff(places).std() == pytest.approx(1.0, abs=0.2)
    assert abs(places[0]) > 10


def test_reflection_keeps_values_between_zero_and_one():
    assert [reflect(value) for value in (0.25, 1.25, 2.25, -0.25, -1.25)] == [0.25, 0.75, 0.25, 0.25, 0.75]


def test_families_take_turns_by_spell():
    settings = replace(RECUR, spell=3, families=("sinusoid", "line", "cubic"))
    names = [recurring_functions.family_of(settings, 0, t) for t in range(12)]
    assert names == [*["sinusoid"] * 3, *["line"] * 3, *["cubic"] * 3, *["sinusoid"] * 3]


def test_the_order_of_spells_can_be_uniformly_random():
    settings = replace(RECUR, spell=2, order="random")
    names = [recurring_functions.family_of(settings, 4, t) for t in range(1200)]
    assert names[::2] == names[1::2], "a spell has one family"
    assert [names.count(family) / 1200 for family in settings.families] == pytest.approx([1 / 3] * 3, abs=0.06)
    assert names[:60] != [recurring_functions.family_of(settings, 5, t) for t in range(60)]


@pytest.mark.parametrize("family", MODELS)
def test_a_task_is_a_function_of_its_family_within_the_parameter_ranges(family):
    settings = replace(RECUR, families=(family,), support=20)
    fits = [fit(family, recurring_functions.make_task(settings, 2, t)) for t in range(60)]
    assert max(error for _, error in fits) < 1e-4
    found = np.array([weights for weights, _ in fits])
    if family == "sinusoid":  # A sin(x - p) = A cos(p) sin x - A sin(p) cos x
        found = np.stack([np.hypot(*found.T), np.arctan2(-found[:, 1], found[:, 0])], 1)
    low, high = np.array(FAMILIES[family].low), np.array(FAMILIES[family].high)
    places = (found - low) / (high - low)
    assert np.all((places > -1e-3) & (places < 1 + 1e-3))
    assert np.all(abs(places.mean(0) - 0.5) < 0.15)
    assert np.all(places.max(0) - places.min(0) > 0.8)


def test_a_sawtooth_rises_over_its_full_range_once_per_pi():
    x, y = points(recurring_functions.make_task(replace(RECUR, families=("sawtooth",), support=300), 2, 7))
    order = np.argsort(x)
    slopes = np.diff(y[order]) / np.diff(x[order])
    rising = slopes > 0
    assert rising.mean() > 0.97
    assert (~rising).sum() in (3, 4), "10 / pi falls in -5..5"
    assert np.median(slopes) * math.pi / 2 == pytest.approx(y.max(), rel=0.1)


def test_clusters_follow_zipfs_law():
    drawn = [heavy_tailed_functions.draw_cluster(HEAVY, generator(1, t)) for t in range(2000)]
    weights = np.array([(k + 1) ** -1.2 for k in range(20)])
    share = np.bincount(drawn, minlength=20) / 2000
    assert share == pytest.approx(weights / weights.sum(), abs=0.03)
    assert share[0] > 7 * share[9] > 0
    even = [heavy_tailed_functions.draw_cluster(replace(HEAVY, exponent=0.0), generator(1, t)) for t in range(2000)]
    assert np.bincount(even, minlength=20) / 2000 == pytest.approx([0.05] * 20, abs=0.02)


@pytest.mark.parametrize(("spread", "widest"), [(0.0, 1e-4), (0.2, 1.0)])
def test_tasks_of_a_cluster_are_near_each_other(spread, widest):
    settings = replace(HEAVY, clusters=1, spread=spread, noise=0.0)
    found = [amplitude(heavy_tailed_functions.make_task(settings, 6, t)) for t in range(40)]
    assert 0 <= max(found) - min(found) <= widest  # a fifth of the amplitude range 0.1 .. 5
    if spread:
        assert max(found) - min(found) > 0.7
    other = amplitude(heavy_tailed_functions.make_task(settings, 7, 0))
    assert abs(other - found[0]) > 0.05, "the seed decides where a cluster is"


def test_clusters_cycle_through_the_families():
    settings = replace(HEAVY, clusters=4, exponent=0.0, noise=0.0, support=20)
    for t in range(12):
        family = list(FAMILIES)[heavy_tailed_functions.draw_cluster(settings, generator(6, t))]
        assert fit(family, heavy_tailed_functions.make_task(settings, 6, t))[1] < 1e-4


def test_noise_has_the_tail_of_students_t():
    zero = lambda x: 0 * x  # noqa: E731
    noise = {
        freedom: points(sample_task(zero, generator(9), 20_000, 20_000, 0.5, freedom))[1] / 0.5
        for freedom in (3.0, math.inf)
    }
    # P(|t_3| > 4) = 0.0280, P(|t_3| > 10) = 0.00213; for a normal variable 6e-5 and about 0.
    assert np.mean(abs(noise[3.0]) > 4) == pytest.approx(0.0280, rel=0.15)
    assert np.mean(abs(noise[3.0]) > 10) == pytest.approx(0.00213, rel=0.5)
    assert np.mean(abs(noise[math.inf]) > 4) < 5e-4
    assert noise[math.inf].std() == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize(
    ("module", "settings"), [(drifting_sinusoids, DRIFT), (recurring_functions, RECUR), (heavy_tailed_functions, HEAVY)]
)
def test_a_task_is_a_pure_function_of_seed_and_number(module, settings):
    settings = replace(settings, noise=0.2)
    first = [wire.encode(module.make_task(settings, 3, t)) for t in range(30)]
    again = [wire.encode(module.make_task(settings, 3, t)) for t in reversed(range(30))]
    assert first == again[::-1]
    assert len({*first, *(wire.encode(module.make_task(settings, 4, t)) for t in range(30))}) == 60
    assert module.make_task(replace(settings, support=4, query=7), 3, 1).query.y.shape == (7, 1)


def test_parameters_scale_linearly_over_their_ranges():
    family = FAMILIES["cubic"]
    assert family.parameters(np.zeros(MAX_PARAMETERS)) == pytest.approx(family.low)
    assert family.parameters(np.ones(MAX_PARAMETERS)) == pytest.approx(family.high)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("drifting_sinusoids", {"width": 4.9}),
        ("drifting_sinusoids", {"motion": "jump"}),
        ("drifting_sinusoids", {"period": 0.0}),
        ("recurring_functions", {"families": ()}),
        ("recurring_functions", {"families": ("parabola",)}),
        ("recurring_functions", {"spell": 0}),
        ("heavy_tailed_functions", {"freedom": 0.0}),
        ("heavy_tailed_functions", {"spread": 1.1}),
        ("heavy_tailed_functions", {"clusters": 0}),
    ],
)
def test_options_out_of_range_are_refused(kind, options):
    with pytest.raises(pydantic.ValidationError):
        pydantic.TypeAdapter(load_module(streams.sources, kind).Settings).validate_python(options)
