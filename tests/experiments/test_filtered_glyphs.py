"""Filtered glyphs: the filters, the streams, and a row that is made anew on a few rounds."""

from collections import Counter

import pytest
import torch

from tests.experiments.filtered_glyphs import runs
from tests.experiments.filtered_glyphs.filters import EXPOSURE, FILTERS, blur, night, pencil
from tests.experiments.filtered_glyphs.page import compose, draw, render
from tests.experiments.filtered_glyphs.runs import CONTESTANTS, Entry, find_component, make_settings
from tests.experiments.filtered_glyphs.streams import SIZE, list_parts, make_stream, order_parts
from tests.experiments.filtered_glyphs.tuning import list_candidates
from tests.experiments.glyphs.tasks import Letters

ROUNDS = 8


@pytest.fixture(scope="module")
def letters():
    """Synthetic letters made of crossing bars at random positions."""
    random = torch.Generator().manual_seed(0)
    masters = torch.zeros(20, 56, 56)
    for master in masters:
        for row, column in torch.randint(8, 44, (3, 2), generator=random):
            master[row : row + 4, 8:48] = 1.0
            master[8:48, column : column + 4] = 1.0
    return masters


@pytest.fixture
def images():
    return torch.rand(3, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# The filters.


@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_is_a_pure_function_to_the_same_shape_and_range(name, images):
    before = images.clone()
    found = FILTERS[name](images)
    assert (found.shape, found.dtype) == (images.shape, images.dtype)
    assert torch.equal(images, before)
    assert torch.equal(found, FILTERS[name](images))
    assert 0 <= float(found.min()) <= float(found.max()) <= 1


def test_filters_differ(images):
    found = [change(images) for change in FILTERS.values()]
    gaps = [float((one - other).abs().mean()) for at, one in enumerate(found) for other in found[:at]]
    assert min(gaps) > 0.1


def test_blur_keeps_the_mean_and_spreads_a_point_by_the_binomial_kernel(images):
    torch.testing.assert_close(blur(images).mean((1, 2, 3)), images.mean((1, 2, 3)))
    point = torch.zeros(1, 1, 9, 9)
    point[0, 0, 4, 4] = 1.0
    weights = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    torch.testing.assert_close(blur(point)[0, 0, 2:7, 2:7], weights[:, None] * weights)
    assert float(blur(images).std()) < 0.5 * float(images.std())


def test_night_is_dark_and_has_little_contrast(images):
    torch.testing.assert_close(night(images).mean(), EXPOSURE * images.mean())
    torch.testing.assert_close(night(images).std(), EXPOSURE * images.std())


def test_pencil_draws_the_edges_of_a_square_on_white_paper():
    square = torch.zeros(1, 1, 12, 12)
    square[0, 0, 3:9, 3:9] = 1.0
    drawn = pencil(square)[0, 0]
    assert torch.equal(drawn[5:7, 5:7], torch.ones(2, 2)), "inside, the paper stays white"
    assert torch.equal(drawn[0], torch.ones(12))
    assert drawn[5, 2:4].tolist() == [0.5, 0.5], "a step of 1 has a central difference of 1/2 on both sides"
    assert drawn[3, 3] == pytest.approx(1 - 0.5**0.5)
    assert torch.equal(pencil(1 - square), pencil(square))


# The streams.


def test_phases_come_back_in_the_same_order_and_a_mixed_stream_has_all_filters():
    parts = order_parts("phases", 0, 2 * ROUNDS)
    assert parts == [part for part in list_parts("phases") for _ in range(2)]
    mixed = order_parts("mixed", 0, 400)
    assert min(Counter(mixed)[name] for name in FILTERS) > 70
    assert len(Counter(mixed)) == 4
    assert mixed == order_parts("mixed", 0, 400) != order_parts("mixed", 1, 400)


def test_both_streams_have_the_same_letters_under_their_filters(letters):
    phases, mixed = (make_stream(letters, stream, 3, 16) for stream in ("phases", "mixed"))
    assert phases[0].task.support.x.shape == (5, 1, SIZE, SIZE)
    same = [torch.equal(one.task.query.x, other.task.query.x) for one, other in zip(phases, mixed, strict=True)]
    assert same == [one.filter == other.filter for one, other in zip(phases, mixed, strict=True)]
    assert any(same)
    plain = next(one for one in (*phases, *mixed) if one.filter == "plain")
    assert float(plain.task.query.x.mean()) < 0.5, "paper is 0"
    first, second = phases[:2]
    assert not torch.equal(first.task.query.x, second.task.query.x)


# The runs.


def test_the_component_of_a_task_is_that_with_the_largest_share():
    assert find_component([3.0, 1.0, 0.0], [3.2, 1.8, 0.0], 1e9) == 1
    assert find_component([3.0, 0.0], [2.7, 1.0], 10.0) == 1
    assert find_component([100.0, 1.0], [99.7, 1.29], 100.0) == 0, "the discount of a large component is no loss"


def test_the_settings_are_those_of_the_contestants():
    assert make_settings(CONTESTANTS["ftml_more_steps"], 1).meta.steps_per_round == runs.MOST * runs.STEPS
    assert make_settings(CONTESTANTS["dp_mixture"], 1).regret.baselines == ("dp_mixture",)
    assert make_settings(CONTESTANTS["dp_mixture"], 1).inner == make_settings(CONTESTANTS["ftml"], 1).inner
    names = [name for name, _ in list_candidates()]
    assert len(names) == len({*names})


@pytest.fixture
def make_row(letters, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "BATCHING", "loop")
    monkeypatch.setattr(runs, "STEPS", 1)
    monkeypatch.setattr(runs, "load_letters", lambda fonts, cache: Letters(letters, letters, 1, 1))

    def make(name, stream="phases", seed=0):
        contestant = CONTESTANTS[name]
        few = contestant if name == "from_scratch" else runs.replace(contestant, steps=1)
        return runs.run(Entry(stream, name, seed, ROUNDS), few, tmp_path, tmp_path)

    return make


def test_rows_are_made_anew_reused_and_compared(make_row, tmp_path):
    rows = [make_row(name) for name in ("dp_mixture", "ftml")]
    mixture, single = rows
    assert len(mixture["drawn"]["after"]) == len(mixture["drawn"]["components"]) == ROUNDS
    assert mixture["clusters"] == len({*mixture["drawn"]["components"]})
    assert -1 <= mixture["rand"] <= 1
    assert single["clusters"] is None
    assert [*mixture["parts"]] == list_parts("phases")
    for row in rows:
        assert row["after"] == pytest.approx(sum(row["drawn"]["after"]) / ROUNDS, abs=1e-4)
        assert 0 <= row["ece"] <= 1
    saved = (tmp_path / "phases-ftml-0.json").stat().st_mtime_ns
    assert make_row("ftml") == single
    assert (tmp_path / "phases-ftml-0.json").stat().st_mtime_ns == saved
    result = compose(rows)
    ahead, *_ = result["figures"]
    assert ahead["value"] == pytest.approx(mixture["after"] - single["after"])
    assert not ahead["met"], "one seed has no interval"
    assert "| plain again |" in render(result)
    assert draw(rows).startswith(b"\x89PNG")


def test_a_learner_of_each_filter_plays_the_tasks_of_its_filter_alone(make_row, letters):
    found = make_row("ftml_by_filter")
    only = [one.task for one in make_stream(letters, "phases", 0, ROUNDS) if one.filter == "night"]
    alone = [*runs.play(runs.replace(CONTESTANTS["ftml_by_filter"], steps=1), 0, only, None)]
    nights = [
        after for after, name in zip(found["drawn"]["after"], found["drawn"]["filters"], strict=True) if name == "night"
    ]
    assert nights == pytest.approx([one.score.accuracy for one in alone])
