"""The reference networks work per sample, for bytes and floats, and their second derivatives are right."""

import pytest
import torch
from torch import nn

import online_meta as om
from trainers.models import attentive_decoder, conv4, gru, in_context_transformer, mlp, transformer


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


def test_an_output_of_conv4_does_not_depend_on_the_rest_of_its_batch():
    model, x = conv4(filters=8, groups=4).double(), images(6).double() / 255
    together = model(x)
    others = torch.cat([x[:1], 100 * torch.rand_like(x[1:])])
    torch.testing.assert_close(model(others)[0], together[0], rtol=1e-12, atol=1e-12)
    for at in range(6):
        torch.testing.assert_close(model(x[at : at + 1])[0], together[at], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.train()(x), model.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bytes_are_scaled_to_floats_between_0_and_1(dtype):
    model, x = conv4(filters=8, groups=4).to(dtype), images(4)
    assert torch.equal(model(x), model(x.to(dtype) / 255))
    assert model(x).dtype == dtype


def test_conv4_distinguishes_images_by_more_than_their_brightness():
    model = conv4(filters=8, groups=4)
    first, second = model(images(2))
    assert not torch.allclose(first, second)


def test_mlp_flattens_its_input_and_has_the_requested_layers():
    model = mlp(inputs=6, outputs=2, hidden=(5, 4))
    assert [tuple(p.shape) for p in model.parameters()] == [(5, 6), (5,), (4, 5), (4,), (2, 4), (2,)]
    x = torch.randn(3, 2, 3)
    assert torch.equal(model(x), model(x.flatten(1)))
    assert model(x).shape == (3, 2)
    assert [tuple(p.shape) for p in mlp(1, 1).parameters()][:4:2] == [(40, 1), (40, 40)]
    assert len(list(mlp(4, 2, hidden=()).parameters())) == 2


def test_default_models_keep_the_parameter_names_of_saved_runs():
    assert [type(layer).__name__ for layer in conv4().body] == ["Conv2d", "GroupNorm", "ReLU"] * 4
    assert list(dict(conv4().named_parameters()))[:4] == [
        "body.0.weight",
        "body.0.bias",
        "body.1.weight",
        "body.1.bias",
    ]
    assert {layer.stride for layer in conv4().body if isinstance(layer, nn.Conv2d)} == {(2, 2)}
    assert list(dict(mlp(1, 1).named_parameters())) == [f"{i}.{kind}" for i in (1, 3, 5) for kind in ("weight", "bias")]


@pytest.mark.parametrize(
    ("norm", "layer"),
    [
        ("batch", nn.BatchNorm2d),
        ("group", nn.GroupNorm),
        ("layer", nn.LayerNorm),
        ("instance", nn.InstanceNorm2d),
        ("none", None),
    ],
)
@pytest.mark.parametrize(("pool", "side"), [("stride", 3), ("max", 2)])
def test_conv4_supports_every_norm_and_pool(norm, layer, pool, side):
    model = conv4(channels=1, size=33, ways=5, filters=4, groups=2, norm=norm, pool=pool)
    found = [type(one) for one in model.body]
    block = [nn.Conv2d, *([layer] if layer else []), nn.ReLU, *([nn.MaxPool2d] if pool == "max" else [])]
    assert found == block * 4
    assert model.head.in_features == 4 * side * side
    assert {one.stride for one in model.body if isinstance(one, nn.Conv2d)} == {(1, 1) if pool == "max" else (2, 2)}
    assert model(images(3, 1, 33)).shape == (3, 5)
    assert not [name for name, _ in model.named_buffers()], "it has running statistics"
    x = images(4, 1, 33).float() / 255
    alone = torch.cat([model(x[at : at + 1]) for at in range(4)])
    assert torch.allclose(alone, model(x), atol=1e-5) is (norm != "batch")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"norm": "grup"}, "norm is 'grup': it is one of group, batch, layer, instance, none"),
        ({"pool": "mean"}, "pool is 'mean': it is one of stride, max"),
        ({"pool": "max", "size": 15}, "size is 15: pool = 'max' halves the side four times"),
    ],
)
def test_conv4_refuses_invalid_arguments(args, message):
    with pytest.raises(ValueError, match=message):
        conv4(**args)


def test_a_context_is_an_additional_input_and_starts_at_zero():
    model, x = mlp(3, 2, hidden=(5,), context=4), torch.randn(6, 3)
    names = list(dict(model.named_parameters()))
    assert names == ["context", "1.weight", "1.bias", "3.weight", "3.bias"]
    assert torch.equal(model.context, torch.zeros(4))
    assert model(x).shape == (6, 2)
    weight, bias = model[1].weight, model[1].bias
    with torch.no_grad():
        model.context.copy_(torch.arange(4.0))
    shifted = torch.relu(x @ weight[:, :3].T + weight[:, 3:] @ torch.arange(4.0) + bias)
    torch.testing.assert_close(model(x), model[3](shifted))
    assert "context" not in dict(mlp(3, 2).named_parameters())
    with pytest.raises(ValueError, match="context is -1"):
        mlp(3, 2, context=-1)


def test_only_the_context_adapts_in_cavia():
    torch.manual_seed(0)
    model = mlp(1, 1, context=4)
    inner = om.Inner(om.model_loss(model, "mse"), om.rules.sgd(lr=1.0), 3, ("context",))
    meta = inner.init(dict(model.named_parameters()))
    batch = om.Batch(torch.randn(5, 1), torch.randn(5, 1))
    adapted = inner.adapt(meta, batch)
    assert [name for name in adapted if not torch.equal(adapted[name], meta.weights[name])] == ["context"]
    grads = om.exact(inner)(meta, om.Task(batch, batch)).grads.weights
    assert all(grad.any() for grad in grads.values())


@pytest.mark.parametrize("make", [attentive_decoder, in_context_transformer])
def test_what_is_looked_up_for_an_input_does_not_depend_on_other_inputs(make):
    torch.manual_seed(0)
    model, x = make(3, 2, width=8), torch.randn(5, 3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    for at in range(5):
        torch.testing.assert_close(model(x[at : at + 1])[0], model(x)[at])
    with pytest.raises(ValueError, match=r"width (is )?0"):
        make(3, 2, width=0)


def test_the_gru_equals_torchs_gru():
    torch.manual_seed(0)
    model, reference = gru(3, 2, hidden=5), nn.GRU(3, 5, batch_first=True)
    layer = model.body[0]
    pairs = [(layer.of_input, "ih"), (layer.of_state, "hh")]
    with torch.no_grad():
        for linear, kind in pairs:
            linear.weight.copy_(getattr(reference, f"weight_{kind}_l0"))
            linear.bias.copy_(getattr(reference, f"bias_{kind}_l0"))
    x = torch.randn(4, 7, 3)
    torch.testing.assert_close(layer(x), reference(x)[0])
    torch.testing.assert_close(model(x), model.head(reference(x)[0][:, -1]))


def test_the_gru_stacks_layers_with_dropout_between():
    kinds = [type(layer).__name__ for layer in gru(3, 2, layers=3, dropout=0.5).body]
    assert kinds == ["GRULayer", "Dropout", "GRULayer", "Dropout", "GRULayer"]
    with pytest.raises(ValueError, match="layers is 0"):
        gru(3, 2, layers=0)


def test_the_transformer_takes_features_or_tokens_up_to_its_length():
    torch.manual_seed(0)
    reads_features, reads_tokens = transformer(2, 9, features=3), transformer(5, 9, tokens=11)
    assert reads_features(torch.randn(4, 9, 3)).shape == reads_features(torch.randn(4, 2, 3)).shape == (4, 2)
    tokens = torch.randint(11, (4, 9))
    assert reads_tokens(tokens).shape == (4, 5)
    assert not torch.allclose(reads_tokens(tokens), reads_tokens(tokens.flip(1))), (
        "the output does not depend on the order"
    )
    for at in range(4):
        torch.testing.assert_close(reads_tokens(tokens[at : at + 1])[0], reads_tokens(tokens)[at])


def test_attention_equals_torchs_attention():
    torch.manual_seed(0)
    layer = transformer(2, 9, features=3, width=8, heads=2).body[0].attention[1]
    reference = nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(layer.queries_keys_values.weight)
        reference.in_proj_bias.copy_(layer.queries_keys_values.bias)
        reference.out_proj.load_state_dict(layer.joined.state_dict())
    x = torch.randn(4, 9, 8)
    torch.testing.assert_close(layer(x), reference(x, x, x, need_weights=False)[0])


def test_the_transformer_applies_dropout_only_in_training_mode():
    torch.manual_seed(0)
    model, x = transformer(2, 9, features=3, dropout=0.5), torch.randn(4, 9, 3)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))
    assert om.model_loss(model.train(), "mse").random
    assert not om.model_loss(transformer(2, 9, features=3), "mse").random


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "features is 0 and tokens 0: give one"),
        ({"features": 1, "tokens": 1}, "features is 1 and tokens 1: give one"),
        ({"features": 1, "width": 9, "heads": 2}, "width is 9 and heads 2"),
    ],
)
def test_the_transformer_refuses_invalid_arguments(args, message):
    with pytest.raises(ValueError, match=message):
        transformer(2, 9, **args)


@pytest.mark.parametrize(
    "make",
    [
        lambda: conv4(1, 8, 3, filters=4, groups=2),
        lambda: mlp(64, 3, (8,)),
        lambda: mlp(64, 3, (8,), context=2),
        lambda: attentive_decoder(64, 3, (8,), width=4, context=2),
        lambda: in_context_transformer(64, 3, features=2, width=8, heads=2, layers=2),
        lambda: nn.Sequential(nn.Flatten(1, 2), transformer(3, 8, features=8, width=8, heads=2)),
        lambda: nn.Sequential(nn.Flatten(1, 2), gru(8, 3, hidden=6, layers=2)),
    ],
)
def test_meta_gradients_of_the_models_agree_with_central_differences(make):
    """Checked along a random direction: no layer breaks the second derivative silently."""
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


@pytest.mark.parametrize("norm", ["group", "none"])
def test_a_zero_context_changes_nothing_and_a_nonzero_one_modulates(norm):
    torch.manual_seed(0)
    module = conv4(1, 16, 3, filters=4, groups=2, norm=norm, context=5)
    plain = conv4(1, 16, 3, filters=4, groups=2, norm=norm)
    plain.load_state_dict({n: w for n, w in module.state_dict().items() if n.startswith(("body", "head"))})
    x = torch.rand(2, 1, 16, 16)
    assert torch.equal(module(x), plain(x))
    with torch.no_grad():
        module.context += 1.0
    assert not torch.allclose(module(x), plain(x))
    with pytest.raises(ValueError, match="context is -1"):
        conv4(context=-1)
