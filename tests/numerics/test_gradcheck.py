"""The check of derivatives reports right, wrong, or unclear where differences cannot decide."""

import pytest
import torch

from online_meta.preflight.gradcheck import PRECISIONS, check_derivative, directional_derivative

AT = {"w": torch.linspace(0.5, 1.5, 7, dtype=torch.float64)}


def judge(value, gradient, at=AT):
    return check_derivative(
        value,
        directional_derivative({name: gradient(tensor) for name, tensor in at.items()}),
        at,
        PRECISIONS[torch.float64],
    )


def test_a_derivative_is_right_or_wrong():
    assert judge(lambda at: at["w"].sin().sum(), torch.cos) == "right"
    assert judge(lambda at: at["w"].sin().sum(), lambda w: 1.001 * w.cos()) == "wrong"
    assert judge(lambda at: at["w"].sin().sum(), torch.zeros_like) == "wrong"


def test_a_zero_derivative_is_checked_too():
    assert judge(lambda at: at["w"].sum() * 0 + 3, torch.zeros_like) == "right"
    assert judge(lambda at: at["w"].sum() * 0 + 3, torch.ones_like) == "wrong"


def test_values_may_be_vectors():
    right, wrong = (
        check_derivative(lambda at: at["w"] ** 2, lambda v, f=f: f * AT["w"] * v["w"], AT, PRECISIONS[torch.float64])
        for f in (2, 1)
    )
    assert (right, wrong) == ("right", "wrong")


@pytest.mark.parametrize("frequency", [1e4, 3e5])
def test_a_function_with_high_curvature_is_checked_with_smaller_steps(frequency):
    def wave(at):
        return (frequency * at["w"]).sin().sum()

    assert judge(wave, lambda w: frequency * (frequency * w).cos()) == "right"
    assert judge(wave, lambda w: 1.01 * frequency * (frequency * w).cos()) == "wrong"


def test_noise_and_kinks_are_reported_as_unclear():
    random = torch.Generator().manual_seed(0)
    noisy = judge(lambda at: torch.rand((), generator=random, dtype=torch.float64), torch.zeros_like)
    kinked = judge(lambda at: at["w"].relu().sum() ** 0.5, torch.ones_like, {"w": torch.zeros(7, dtype=torch.float64)})
    assert (noisy, kinked) == ("unclear", "unclear")
