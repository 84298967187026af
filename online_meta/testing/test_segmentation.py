"""What every way to find changes, and every likelihood that needs no model, keeps."""

import pytest
import torch

import online_meta.changepoints.detectors
import online_meta.changepoints.likelihoods
from online_meta import registry
from online_meta.changepoints.segments import TaskSegment, segment_samples
from online_meta.testing.segmented import draw_classes, draw_lines

WAYS = {
    name: registry.load(online_meta.changepoints.detectors, name)
    for name in registry.names(online_meta.changepoints.detectors)
}
LIKELIHOODS = {
    name: registry.load(online_meta.changepoints.likelihoods, name)
    for name in registry.names(online_meta.changepoints.likelihoods)
}
LENGTHS = [40, 25, 60]
ENDS = [40, 65]
STREAMS = {"linear": draw_lines, "gaussian_classes": draw_classes}
OPTIONS = {"run_length": {"hypotheses": 20}, "loss_jump": {"jump": 3.0}}
OUTPUTS = {"linear": 1, "gaussian_classes": 3}

every_likelihood = pytest.mark.parametrize("name", LIKELIHOODS)
every_pair = pytest.mark.parametrize(("way", "name"), [(way, name) for way in WAYS for name in LIKELIHOODS])


def opened(way, name):
    return WAYS[way](LIKELIHOODS[name](2, OUTPUTS[name]), **OPTIONS.get(way, {}))


def copied(tensors):
    return {key: value.clone() for key, value in tensors.items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def size(memory):
    return sum(value.numel() * value.element_size() for value in memory.values())


@every_pair
def test_changes_are_found_near_where_they_are(way, name):
    for seed in range(3):
        segments = list(segment_samples(opened(way, name), STREAMS[name](seed, LENGTHS), 1000))
        assert [segment.end for segment in segments[:-1]] == pytest.approx(ENDS, abs=5), (seed, segments)
        assert all(0 < segment.detected_at - end <= 15 for segment, end in zip(segments, ENDS, strict=False))


@every_pair
def test_nothing_is_found_where_nothing_changes(way, name):
    segments = list(segment_samples(opened(way, name), STREAMS[name](0, [150]), 1000))
    assert segments == [TaskSegment(0, 150, 150)]


@every_pair
def test_what_is_behind_a_cut_is_cut_alike_from_there(way, name):
    samples = STREAMS[name](1, [30, 12, 40, 33])
    segments = list(segment_samples(opened(way, name), samples, 25))
    assert len(segments) >= 5
    for at, segment in enumerate(segments):
        end = segment.end
        behind = [
            TaskSegment(s.begin + end, s.end + end, s.detected_at + end)
            for s in segment_samples(opened(way, name), samples[end:], 25)
        ]
        assert behind == segments[at + 1 :]


@every_pair
def test_what_is_remembered_is_not_written_to_and_is_bounded(way, name):
    segmenter, sizes = opened(way, name), []
    memory = segmenter.start()
    assert segmenter.change(memory) is None
    for x, y in STREAMS[name](2, [80]):
        before = copied(memory)
        after = segmenter.update(memory, x, y)
        assert same(memory, before)
        assert same(after, segmenter.update(memory, x, y))
        segmenter.change(after)
        memory = after
        sizes.append(size(memory))
    assert sizes[-1] == sizes[-40], "as large after 80 samples as after 40"
    assert same(segmenter.start(), opened(way, name).start())


@every_likelihood
def test_a_likelihood_treats_the_runs_of_a_stack_as_if_each_were_alone(name):
    likelihood, samples = LIKELIHOODS[name](2, OUTPUTS[name]), STREAMS[name](3, [6])
    alone = []
    for first in range(5):
        runs = likelihood.start()
        for x, y in samples[first:5]:
            scores, runs = likelihood.score(runs, x, y), likelihood.update(runs, x, y)
            assert scores.shape == (1,)
            assert scores.dtype == torch.float64
        alone.append(runs)
    stack = {key: torch.cat([runs[key] for runs in alone]) for key in alone[0]}
    before = copied(stack)
    x, y = samples[5]
    torch.testing.assert_close(
        likelihood.score(stack, x, y), torch.cat([likelihood.score(runs, x, y) for runs in alone]), rtol=1e-12, atol=0
    )
    met = likelihood.update(stack, x, y)
    for key, value in met.items():
        expected = torch.cat([likelihood.update(runs, x, y)[key] for runs in alone])
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    assert same(stack, before), "not written to"


@pytest.mark.parametrize(
    ("build", "options"),
    [
        *((WAYS["run_length"], {"hazard": bad}) for bad in (0.0, 1.0, -1.0, float("nan"))),
        *((WAYS["run_length"], {"certainty": bad}) for bad in (0.0, 1.0)),
        (WAYS["run_length"], {"least": 0}),
        (WAYS["run_length"], {"hypotheses": 1}),
        *((WAYS["loss_jump"], {"jump": bad}) for bad in (0.0, -1.0, float("nan"), float("inf"))),
        (WAYS["loss_jump"], {"window": 0}),
        (WAYS["loss_jump"], {"least": 0}),
    ],
)
def test_options_out_of_range_are_refused(build, options):
    (option,) = options
    with pytest.raises(ValueError, match=f"{option} (is )?"):
        build(LIKELIHOODS["linear"](1, 1), **options)


@every_likelihood
@pytest.mark.parametrize("option", ["strength", "shape", "spread", "features", "seed"])
def test_options_of_likelihoods_out_of_range_are_refused(name, option):
    with pytest.raises(ValueError, match=f"{option} is -1"):
        LIKELIHOODS[name](1, 1, **{option: -1})
    with pytest.raises(ValueError, match="inputs is 0"):
        LIKELIHOODS[name](0, 1)


def test_a_segment_has_room():
    with pytest.raises(ValueError, match="max_samples is 0"):
        list(segment_samples(opened("run_length", "linear"), draw_lines(0, [3]), 0))
