"""The judge of derivatives: right, wrong, or unclear where differences cannot tell."""

import pytest
import torch

from online_meta.preflight.gradcheck import PRECISIONS, check_derivative, directional_derivative

AT = {"w": torch.linspace(0.5, 1.5, 7, dtype=torch.float64)}


def evaluation_loss(value, gradient, at=AT):
    return check_derivative(
        value,
        directional_derivative({name: gradient(tensor) for name, tensor in at.items()}),
        at,
        PRECISIONS[torch.float64],
    )


def test_a_derivative_is_right_or_wrong():
    assert evaluation_loss(lambda at: at["w"].sin().sum(), torch.cos) == "right"
    assert evaluation_loss(lambda at: at["w"].sin().sum(), lambda w: 1.001 * w.cos()) == "wrong"
    assert evaluation_loss(lambda at: at["w"].sin().sum(), torch.zeros_like) == "wrong"


def test_nothing_changes_where_the_derivative_is_zero():
    assert evaluation_loss(lambda at: at["w"].sum() * 0 + 3, torch.zeros_like) == "right"
    assert evaluation_loss(lambda at: at["w"].sum() * 0 + 3, torch.ones_like) == "wrong"


def test_values_may_be_vectors():
    right, wrong = (
        check_derivative(lambda at: at["w"] ** 2, lambda v, f=f: f * AT["w"] * v["w"], AT, PRECISIONS[torch.float64])
        for f in (2, 1)
    )
    assert (right, wrong) == ("right", "wrong")


@pytest.mark.parametrize("frequency", [1e4, 3e5])
def test_what_bends_sharply_is_looked_at_more_closely(frequency):
    def wave(at):
        return (frequency * at["w"]).sin().sum()

    assert evaluation_loss(wave, lambda w: frequency * (frequency * w).cos()) == "right"
    assert evaluation_loss(wave, lambda w: 1.01 * frequency * (frequency * w).cos()) == "wrong"


def test_where_differences_cannot_tell_it_is_unclear():
    random = torch.Generator().manual_seed(0)
    noisy = evaluation_loss(lambda at: torch.rand((), generator=random, dtype=torch.float64), torch.zeros_like)
    kinked = evaluation_loss(
        lambda at: at["w"].relu().sum() ** 0.5, torch.ones_like, {"w": torch.zeros(7, dtype=torch.float64)}
    )
    assert (noisy, kinked) == ("unclear", "unclear")
