"""The reference networks: per sample, for bytes and floats, for the usual image sizes, safe to differentiate twice."""

import pytest
import torch

import online_meta as om
from trainers.models import conv4, mlp


def images(n, channels=3, size=28, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, channels, size, size), generator=random, dtype=torch.uint8)


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 28), (3, 32), (1, 33), (1, 5)])
def test_conv4_maps_images_to_logits(channels, size):
    model = conv4(channels=channels, size=size, ways=7, filters=8, groups=4)
    assert model(images(5, channels, size)).shape == (5, 7)
    assert model(images(1, channels, size)).shape == (1, 7)


def test_conv4_halves_the_side_four_times():
    assert conv4(size=28).head.in_features == 32 * 2 * 2
    assert conv4(size=32).head.in_features == 32 * 2 * 2
    assert conv4(size=33).head.in_features == 32 * 3 * 3


def test_an_answer_of_conv4_does_not_depend_on_what_else_is_asked_with_it():
    model, x = conv4(filters=8, groups=4).double(), images(6).double() / 255
    together = model(x)
    others = torch.cat([x[:1], 100 * torch.rand_like(x[1:])])
    torch.testing.assert_close(model(others)[0], together[0], rtol=1e-12, atol=1e-12)
    for at in range(6):
        torch.testing.assert_close(model(x[at : at + 1])[0], together[at], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.train()(x), model.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bytes_are_floats_between_0_and_1(dtype):
    model, x = conv4(filters=8, groups=4).to(dtype), images(4)
    assert torch.equal(model(x), model(x.to(dtype) / 255))
    assert model(x).dtype == dtype


def test_images_matter_by_more_than_their_brightness():
    model = conv4(filters=8, groups=4)
    first, second = model(images(2))
    assert not torch.allclose(first, second)


def test_mlp_flattens_and_has_the_layers_asked_for():
    model = mlp(inputs=6, outputs=2, hidden=(5, 4))
    assert [tuple(p.shape) for p in model.parameters()] == [(5, 6), (5,), (4, 5), (4,), (2, 4), (2,)]
    x = torch.randn(3, 2, 3)
    assert torch.equal(model(x), model(x.flatten(1)))
    assert model(x).shape == (3, 2)
    assert [tuple(p.shape) for p in mlp(1, 1).parameters()][:4:2] == [(40, 1), (40, 40)]
    assert len(list(mlp(4, 2, hidden=()).parameters())) == 2


@pytest.mark.parametrize("make", [lambda: conv4(1, 8, 3, filters=4, groups=2), lambda: mlp(64, 3, (8,))])
def test_their_meta_gradients_are_right(make):
    """Along a direction, against central differences: no layer breaks the second derivative in silence."""
    module = make().double()
    random = torch.Generator().manual_seed(3)

    def batch(n):
        return om.Batch(torch.randn(n, 1, 8, 8, generator=random).double(), torch.arange(n) % 3)

    task = om.Task(batch(6), batch(5))
    inner = om.Inner(om.model_loss(module, "cross_entropy"), om.rules.sgd(lr=0.1), steps=2)
    meta = inner.init(dict(module.named_parameters()))
    along = {name: torch.randn(w.shape, generator=random).double() for name, w in meta.weights.items()}

    def objective(size):
        moved = om.Meta({name: w + size * along[name] for name, w in meta.weights.items()}, {})
        return float(inner.loss(inner.adapt(moved, task.support), task.query))

    found = om.exact(inner)(meta, task).grads.weights
    slope = sum(float((found[name] * along[name]).sum()) for name in along)
    assert slope == pytest.approx((objective(1e-6) - objective(-1e-6)) / 2e-6, rel=1e-4)
