import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import online_meta as om
from online_meta.testing.compare import assert_close
from online_meta.testing.oracle import unrolled_maml
from tests.numerics.problems import problem, regression_task


def test_the_functional_loss_equals_the_modules_loss():
    module, _, make_task = given = problem("conv_group_norm")
    batch = make_task().support
    loss = om.model_loss(module, "cross_entropy")
    expected = F.cross_entropy(module(batch.x), batch.y).detach()
    torch.testing.assert_close(loss(given.weights(), batch), expected, rtol=1e-14, atol=0)


def test_any_callable_of_output_and_y_is_a_loss():
    module, _, make_task = given = problem("mlp_tanh")
    inner = om.Inner(om.model_loss(module, F.l1_loss), om.rules.sgd(lr=0.1), 2)
    found = om.exact(inner)(inner.init(given.weights()), make_task())
    after = inner.adapt(inner.init(given.weights()), make_task().support)
    assert torch.equal(found.loss, F.l1_loss(om.model_output(module)(after, make_task().query.x), make_task().query.y))


def test_an_unknown_loss_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="did you mean 'cross_entropy'"):
        om.model_loss(nn.Linear(1, 1), "crossentropy")


def test_a_missing_or_misspelt_weight_is_an_error():
    module, _, make_task = given = problem("mlp_tanh")
    weights = given.weights()
    weights["head.biass"] = weights.pop("head.bias")
    with pytest.raises(ValueError, match=r"\['head\.bias'\] are missing, \['head\.biass'\] are unknown"):
        om.model_loss(module, "mse")(weights, make_task().support)


class Tied(nn.Module):
    """One matrix with two names: ``named_parameters`` lists it once."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(4, 4, bias=False)
        self.decode = nn.Linear(4, 4, bias=False)
        self.decode.weight = self.encode.weight
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.decode(torch.tanh(self.encode(x))))


def test_tied_weights_count_as_one_weight():
    torch.manual_seed(0)
    module = Tied().double()
    weights = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    assert set(weights) == {"encode.weight", "head.weight", "head.bias"}
    inner = om.Inner(om.model_loss(module, "mse"), om.rules.sgd(lr=0.1), 3)
    found = om.exact(inner)(inner.init(weights), regression_task())
    right = unrolled_maml(module, "mse", weights, regression_task(), lr=0.1, steps=3)
    assert_close(found.grads.weights, right.grads.weights, 1e-10)


class Scaled(nn.Module):
    """A model with a constant buffer."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.register_buffer("scale", torch.full((4,), 2.0))

    def forward(self, x):
        return self.head(x * self.scale)


def test_buffers_are_captured_at_construction():
    module = Scaled().double()
    weights = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    output, x = om.model_output(module), regression_task().support.x
    before = module(x).detach()
    module.scale.fill_(100.0)
    assert torch.equal(output(weights, x), before)


def test_the_function_stores_no_weights():
    module = nn.Linear(4, 2)
    output = om.model_output(module)
    held = [cell.cell_contents for cell in output.__closure__]
    (skeleton,) = [value.skeleton for value in held if isinstance(value, threading.local)]
    assert skeleton is not module
    assert {weight.device.type for weight in skeleton.parameters()} == {"meta"}
    assert {weight.device.type for weight in module.parameters()} == {"cpu"}


def test_accuracy_is_the_fraction_of_correct_predictions():
    accuracy = om.accuracy_of(lambda params, x: x)
    x = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    assert float(accuracy({}, om.Batch(x, torch.tensor([1, 0, 0, 0])))) == 0.75


def test_threads_do_not_see_each_others_parameters():
    """The daemon adapts for several clients at once in threads."""
    module = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    output = om.model_output(module)
    given = [{name: torch.randn_like(weight) for name, weight in module.named_parameters()} for _ in range(3)]
    x = torch.randn(3, 4)
    right, wrong = [output(params, x) for params in given], []

    def compare_outputs(params, answer):
        for _ in range(500):
            try:
                wrong.extend([] if torch.equal(output(params, x), answer) else ["another answer"])
            except RuntimeError as error:
                wrong.append(str(error))

    threads = [threading.Thread(target=compare_outputs, args=pair) for pair in zip(given, right, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_model_whose_weights_are_all_frozen_is_refused():
    module = nn.Linear(4, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="no weight to learn: all are frozen"):
        om.Inner(om.model_loss(module, "mse"), om.rules.sgd(lr=0.1)).init(dict(module.named_parameters()))
