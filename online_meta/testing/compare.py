"""How far two sets of tensors are apart."""

import torch

from online_meta.types import Params


def flat(params: Params) -> torch.Tensor:
    """All entries in one vector, in the order of the names."""
    return torch.cat([params[name].flatten() for name in sorted(params)])


def relative_error(found: Params, right: Params) -> float:
    """Return ||found - right|| / ||right|| over all entries (the plain distance when all that is right is 0)."""
    assert found.keys() == right.keys()
    scale = float(flat(right).norm())
    return float((flat(found) - flat(right)).norm()) / (scale or 1.0)


def assert_close(found: Params, right: Params, tolerance: float) -> None:
    """Assert that every tensor is right to ``tolerance`` of its own norm, or to 1e-4 of that of the whole's.

    The allowance is for tensors whose true gradient is 0, such as a bias in front of a normalisation.
    """
    assert found.keys() == right.keys()
    whole = float(flat(right).norm())
    for name, value in right.items():
        assert found[name].shape == value.shape, name
        assert found[name].dtype == value.dtype, name
        error = float((found[name] - value).norm())
        assert error <= tolerance * max(float(value.norm()), 1e-4 * whole, 1e-300), (name, error)
