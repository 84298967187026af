"""The table of segmented streams, at a small size."""

import math
from itertools import pairwise

import pytest
import torch

from tests.experiments.segmentation import WAYS, Way, draw_stream, render, run_row


@pytest.mark.parametrize("stream", ["sinusoid", "classes"])
def test_a_stream_changes_only_at_the_returned_positions(stream):
    samples, changes = draw_stream(stream, 1, 600)
    again, same = draw_stream(stream, 1, 600)
    assert changes == same
    assert all(
        torch.equal(a, b) for one, two in zip(samples, again, strict=True) for a, b in zip(one, two, strict=True)
    )
    assert draw_stream(stream, 2, 600)[1] != changes
    ends = [0, *changes, 600]
    assert min(b - a for a, b in zip(ends, changes, strict=False)) >= 10
    assert 5 <= len(changes) <= 24
    if (
        stream == "sinusoid"
    ):  # y = A sin(x - p) + noise, so a fit of sin x and cos x between changes leaves only the noise
        for begin, end in pairwise(ends):
            x, y = (torch.stack([pair[half] for pair in samples[begin:end]]) for half in (0, 1))
            waves = torch.cat([x.sin(), x.cos()], 1)
            off = waves @ torch.linalg.lstsq(waves, y).solution - y
            assert 0.03 < float(off.std()) < 0.2


def test_a_row_is_computed_saved_and_rendered(tmp_path):
    ways = [
        next(way for way in WAYS if way.method == method and way.stream == "classes")
        for method in ("count", "run_length")
    ]
    rows = [run_row(way, seed, 300, 0, tmp_path) for way in ways for seed in range(2)]
    assert len(list(tmp_path.glob("*.json"))) == 4
    assert run_row(ways[0], 0, 300, 0, tmp_path) == rows[0]
    assert rows[2]["purity"] > rows[0]["purity"]
    assert rows[0]["false_alarms"] + rows[0]["changes"] - rows[0]["missed"] == 5, "six segments of fifty"
    text = render({"command": "c", "commit": "d", "rows": rows})
    assert "| classes | count | - | count 50 | " in text
    share = (rows[2]["purity"] + rows[3]["purity"]) / 2
    assert f" | {share:.3f} ± " in text


def test_the_loss_of_a_trained_leader_is_used_as_likelihood(tmp_path):
    row = run_row(Way("sinusoid", "loss_jump", "the leader's loss", {"jump": 1.0}), 0, 60, 1, tmp_path)
    assert [file.suffix for file in tmp_path.glob("leader*")] == [".safetensors"]
    assert row["samples"] == 60
    assert row["microseconds"] > 0
    assert math.isfinite(row["purity"])
