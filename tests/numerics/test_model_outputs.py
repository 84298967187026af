"""Models that return objects, dicts or tuples, and models that take several inputs: the output is found everywhere."""

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.func import vmap

import online_meta as om
from online_meta.batching.plan import ExecutionPlan, signature_of
from online_meta.batching.task_sum import TaskSum
from online_meta.functional.features import compute_features
from online_meta.functional.model import model_output
from online_meta.learners import MemoryReplayBuffer, ftml
from online_meta.preflight.preflight import preflight
from online_meta.regret.scoring import score_task
from online_meta.testing.compare import assert_close
from online_meta.testing.learner_problems import net, remembered, setup, stream, weights_of
from trainers.build import build_context
from trainers.comparators import RefreshRequest
from trainers.comparators.dynamic import refresh as refresh_dynamic
from trainers.comparators.hindsight import refresh as refresh_hindsight
from trainers.settings import ModelSettings, RegretSettings, TrainerSettings

PLAIN = setup()


@dataclass
class Classified:
    """What libraries of pretrained models return, such as a loss that is None and hidden states in a tuple."""

    loss: torch.Tensor | None
    logits: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...]


class Pair(NamedTuple):
    scores: torch.Tensor
    hidden: torch.Tensor


class Slotted:
    __slots__ = ("logits",)

    def __init__(self, logits):
        self.logits = logits


class Computed:
    def __init__(self, value):
        self._value = value

    @property
    def logits(self):
        return self._value


RESULTS = {
    "an object": ("logits", lambda value, hidden: Classified(None, value, (hidden,))),
    "a tensor inside": ("logits.0", lambda value, hidden: Classified(None, (value, hidden), ())),
    "a dict": ("logits", lambda value, hidden: {"logits": value, "hidden": (hidden,)}),
    "an ordered dict": ("logits", lambda value, hidden: OrderedDict(hidden=hidden, logits=value)),
    "a key with a dot": ("head.out", lambda value, hidden: {"head.out": value, "head": None}),
    "a dict in a tuple": ("1.best", lambda value, hidden: (hidden, {"best": value})),
    "a list": ("1", lambda value, hidden: [hidden, value]),
    "a named tuple": ("scores", lambda value, hidden: Pair(value, hidden)),
    "slots": ("logits", lambda value, hidden: Slotted(value)),
    "a property": ("logits", lambda value, hidden: Computed(value)),
}


class Returning(nn.Module):
    """The network of the plain problem, whose result is put into something."""

    def __init__(self, put=None, seed=0):
        super().__init__()
        self.layers = net(seed)
        self.put = put or RESULTS["an object"][1]

    def forward(self, x):
        hidden = self.layers[:2](x)
        return self.put(self.layers[2](hidden), hidden)


def classified() -> nn.Module:
    return Returning().float()


def plain() -> nn.Module:
    return nn.Sequential(OrderedDict(layers=net())).float()


def context_of(module, output, **changes):
    inner = om.Inner(om.model_loss(module, "mse", output=output), om.rules.sgd(lr=0.05), 2)
    fields = {
        "inner": inner,
        "gradient": om.exact(inner),
        "start": inner.init(weights_of(module)),
        "draw_weights": lambda key: weights_of(Returning(seed=100 + key)),
    }
    return setup(**{**fields, **changes})


def renamed(params):
    return {name.removeprefix("layers."): value for name, value in params.items()}


@pytest.mark.parametrize("kind", RESULTS)
def test_the_meta_gradient_is_that_of_the_model_that_returns_the_tensor(kind):
    output, put = RESULTS[kind]
    module, (task,) = Returning(put), stream(1)
    context = context_of(module, output)
    found, right = context.gradient(context.start, task), PLAIN.gradient(PLAIN.start, task)
    assert_close(renamed(found.grads.weights), right.grads.weights, 1e-12)
    assert score_task(context.inner, context.start, task) == score_task(PLAIN.inner, PLAIN.start, task)
    direct = model_output(module, output=output)(weights_of(module), task.query.x)
    assert torch.equal(direct, net()(task.query.x))


@pytest.mark.parametrize("mode", ["vmap", "traced"])
def test_tasks_are_stacked_and_recorded_as_those_of_other_models(mode):
    module, (task,) = Returning(), stream(1)
    context = context_of(module, "logits")
    total = TaskSum(context.gradient)
    total.follow([ExecutionPlan(mode, 2, signature_of(task))])
    right = PLAIN.gradient(PLAIN.start, task)
    assert_close(renamed(total(context.start, [task], [1.0]).grads.weights), right.grads.weights, 1e-10)


def test_learners_preflight_and_heads_take_the_output_too():
    context, tasks = context_of(Returning(), "logits"), stream(3)
    report = preflight(context.inner, context.start, tasks)
    assert report.problems == ()
    losses = []
    for one in (context, PLAIN):
        learner = ftml.build(replace(one, buffer=MemoryReplayBuffer()))
        losses.append([(learner.score(task).loss_after, learner.learn(task).steps[0].norm) for task in tasks])
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-12, atol=0)
    found = compute_features(context.inner.loss, context.start.weights, tasks[0].support.x)
    assert found.prefix == "layers.2."
    assert torch.equal(found.values, net()[:2](tasks[0].support.x))


@pytest.mark.parametrize("refresh", [refresh_hindsight, refresh_dynamic])
def test_a_configured_output_reaches_the_comparators(refresh):
    tasks = [om.Task(*(om.Batch(b.x.float(), b.y.float()) for b in one)) for one in stream(3)]
    found = []
    for build, output in (("classified", "logits"), ("plain", "")):
        model = ModelSettings(f"tests.numerics.test_model_outputs:{build}", loss="mse", output=output)
        context = build_context(TrainerSettings(model), remembered(tasks))
        context = replace(context, draw_weights=lambda key: PLAIN.draw_weights(key))
        regret = RegretSettings(hindsight_restarts=1, dynamic_steps=2)
        result = refresh(context, regret, RefreshRequest(3, 0), None)
        found.append(result.comparator.cumulative_loss)
    torch.testing.assert_close(*map(torch.tensor, found))


@pytest.mark.parametrize(
    ("kind", "output", "message"),
    [
        (
            "an object",
            "",
            r"a Classified with loss \(NoneType\), logits \(tensor \(4, 2\)\), .* such as output = 'logits'",
        ),
        (
            "an object",
            "logit",
            r"returns a Classified with .*, and there is no 'logit' in it: did you mean 'logits'\? known: hidden_s",
        ),
        (
            "an object",
            "hidden_states.3",
            r"'hidden_states' is a tuple with 0 \(.*\), and there is no '3' in it: known: 0",
        ),
        (
            "an object",
            "hidden_states",
            r"output = 'hidden_states' of the model is a tuple .* output = 'hidden_states\.0'",
        ),
        ("an object", "loss", r"output = 'loss' of the model is a NoneType, and an output is a tensor"),
        ("a list", "logits", r"the model returns a list with 0 .*, 1 .*, and there is no 'logits' in it: known: 0, 1"),
        ("a dict", "", r"the model returns a dict with logits .*, hidden \(tuple\), .* such as output = 'logits'"),
    ],
)
def test_a_part_that_is_no_output_is_named_with_what_there_is(kind, output, message):
    module, (task,) = Returning(RESULTS[kind][1]), stream(1)
    with pytest.raises(ValueError, match=message):
        om.model_loss(module, "mse", output=output)(weights_of(module), task.support)


def test_a_tensor_has_no_part():
    (task,) = stream(1)
    with pytest.raises(
        ValueError, match=r"the model returns a tensor of shape \(4, 2\), which is the output: leave out"
    ):
        om.model_loss(net(), "mse", output="logits")(weights_of(net()), task.support)


class Masked(nn.Module):
    """Takes its inputs as keywords."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2).double()

    def forward(self, values, *, mask=None):
        return self.layer(values if mask is None else values * mask)


class Dictionary(Masked):
    """Takes its inputs as one dict."""

    def forward(self, inputs):
        return super().forward(inputs["values"], mask=inputs["mask"])


class Open(Masked):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("build", [Masked, Dictionary, Open])
def test_named_inputs_are_keywords_or_one_dict(build):
    module, (task,) = build(), stream(1)
    mask = (task.support.x > 0).double()
    named = om.Batch({"values": task.support.x, "mask": mask}, task.support.y)
    loss = om.model_loss(module, "mse")
    weights = weights_of(module)
    right = (
        ((task.support.x * mask) @ weights["layer.weight"].T + weights["layer.bias"] - task.support.y).square().mean()
    )
    torch.testing.assert_close(loss(weights, named), right)
    pair = {name: torch.stack([value, value]) for name, value in named.x.items()}
    both = vmap(lambda x: loss.output(weights, x))(pair)
    torch.testing.assert_close(both[1], loss.output(weights, named.x))


def test_inputs_of_other_names_are_refused_with_both():
    (task,) = stream(1)
    batch = om.Batch({"values": task.support.x, "masks": task.support.x}, task.support.y)
    message = "forward takes values, mask, and the task has the inputs values, masks: give the inputs the names"
    with pytest.raises(ValueError, match=message):
        om.model_loss(Masked(), "mse")(weights_of(Masked()), batch)
