"""Low-rank adaptation and frozen weights: what is learned, what is frozen, and what stays out of saved files."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

import online_meta as om
from deploy.leader import Adapter
from online_meta.answers import pack_meta
from online_meta.learners import MemoryReplayBuffer
from online_meta.testing.compare import assert_close, relative_error
from online_meta.testing.oracle import unrolled_maml
from online_meta.types import MetaGrad
from tests.numerics.problems import sequence_task
from tests.support.runs import SETTINGS
from trainers.build import build_context, build_learners, build_module
from trainers.journal.leader_file import encode_leader
from trainers.models import lora, transformer
from trainers.models.lora import LowRankLinear
from trainers.settings import InnerSettings, ModelSettings, TrainerSettings
from trainers.settings_fingerprint import SettingsChanged, check_same_settings, reproducibility_key

ARGS = {"outputs": 2, "length": 5, "features": 3, "width": 8, "heads": 2, "layers": 2}
FROZEN = {"layers": ["body.*"], "rank": 2, "freeze": True, "learned": ["head.*"]}
CHOSEN = ("body.0.attention.1.queries_keys_values", "body.0.attention.1.joined", "body.0.network.1", "body.0.network.3")


def build_module_with_adapters(seed=0, **options):
    torch.manual_seed(seed)
    module = lora("trainers.models:transformer", args=ARGS, **options).double()
    with torch.no_grad():
        for name, weight in module.named_parameters():
            weight.add_(0.1 * torch.randn_like(weight) * ("lora_b" in name))
    return module


def trainable_weights(module):
    return {name: weight.detach().clone() for name, weight in module.named_parameters() if weight.requires_grad}


def test_the_adapted_model_starts_equal_to_the_model_it_wraps():
    torch.manual_seed(0)
    plain = transformer(**ARGS)
    torch.manual_seed(0)
    module = lora("trainers.models:transformer", args=ARGS, rank=3, layers=["body.*"])
    x = torch.randn(4, 5, 3)
    assert torch.equal(module(x), plain(x))
    added = dict(module.named_parameters()).keys() - dict(plain.named_parameters()).keys()
    assert {name for name in added if name.startswith("body.0")} == {f"{n}.lora_{ab}" for n in CHOSEN for ab in "ab"}


def test_a_low_rank_layer_adds_a_scaled_product_to_its_weight():
    layer = LowRankLinear(torch.nn.Linear(5, 4).double(), 2, 6.0)
    torch.nn.init.normal_(layer.lora_b)
    x = torch.randn(3, 5, dtype=torch.float64)
    whole = layer.weight + 6.0 / 2 * layer.lora_b @ layer.lora_a
    torch.testing.assert_close(layer(x), F.linear(x, whole, layer.bias))


@pytest.mark.parametrize("recompute", [(), ("body.*",)], ids=["kept", "recomputed"])
@pytest.mark.parametrize("options", [{"layers": ["body.*"], "rank": 2}, FROZEN], ids=["learned", "frozen"])
def test_the_gradient_is_exact_for_the_learned_weights(options, recompute):
    module = build_module_with_adapters(**options)
    weights = trainable_weights(module)
    inner = om.Inner(om.model_loss(module, "mse", recompute=recompute), om.rules.sgd(lr=0.1), 3, ("*lora*",))
    meta = inner.init(dict(module.named_parameters()))
    assert meta.weights.keys() == weights.keys()
    for seed in range(3):
        found = om.exact(inner)(meta, sequence_task(seed)).grads.weights
        right, first = (
            unrolled_maml(
                module,
                "mse",
                weights,
                sequence_task(seed),
                lr=0.1,
                steps=3,
                fast=("*lora*",),
                constant_gradients=first_order,
            ).grads.weights
            for first_order in (False, True)
        )
        assert_close(found, right, 1e-10)
        assert relative_error(first, right) > 1e-4


def test_the_engine_stores_nothing_for_frozen_weights():
    module = build_module_with_adapters(**FROZEN)
    inner = om.Inner(om.model_loss(module, "mse"), om.rules.sgd(lr=0.1), 1, ("*lora*",))
    meta = inner.init(dict(module.named_parameters()))
    engine = om.MetaOptimizer(meta)
    grads = om.exact(inner)(meta, sequence_task())
    engine.apply(MetaGrad(grads.loss, grads.grads), 1.0)
    assert all("lora" in name or "head" in name for name in engine.save())
    assert {name.split(".", 1)[1] for name in engine.save() if name.startswith("weights.")} == trainable_weights(
        module
    ).keys()


def test_frozen_weights_are_captured_and_can_be_passed_explicitly():
    module = build_module_with_adapters(**FROZEN)
    loss = om.model_loss(module, "mse")
    x = sequence_task().support.x
    before = loss.output(trainable_weights(module), x)
    everything = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(1.0)
    assert torch.equal(loss.output({n: w for n, w in everything.items() if n not in loss.frozen}, x), before)
    assert torch.equal(loss.output(everything, x), before)
    assert not torch.allclose(loss.output(dict(module.named_parameters()), x), before)


def settings(**options):
    model = ModelSettings(
        "trainers.models:lora", {"build": "trainers.models:transformer", "args": ARGS, **FROZEN, **options}, "mse"
    )
    inner = InnerSettings(steps=2, lr=0.1, fast=("*lora*",))
    return TrainerSettings(model, inner, SETTINGS.meta, SETTINGS.regret, SETTINGS.engine)


def single(task):
    return om.Task(*(om.Batch(batch.x.float(), batch.y.float()) for batch in task))


def test_a_separate_process_adapts_the_low_rank_leader_of_a_run(tmp_path):
    chosen = settings()
    setup = build_context(chosen, MemoryReplayBuffer())
    learners = build_learners(chosen, setup)
    tasks = [single(sequence_task(seed)) for seed in range(3)]
    for round, task in enumerate(tasks):
        setup.buffer.add(round, task)
        for learner in learners.values():
            learner.score(task)
            learner.learn(task)
    assert setup.draw_weights(1).keys() == setup.start.weights.keys()
    meta = setup.engine(setup.start).meta()
    (tmp_path / "leader.safetensors").write_bytes(encode_leader(pack_meta(meta), 3))
    adapter = Adapter(chosen, tmp_path / "leader.safetensors")
    found, round, _ = adapter.predict(tasks[0].support, tasks[0].query.x)
    right = setup.inner.loss.output(setup.inner.adapt(meta, tasks[0].support), tasks[0].query.x)
    assert round == 3
    assert torch.equal(found[0].outputs[0], right)


def test_the_model_starts_with_the_weights_of_a_file(tmp_path):
    torch.manual_seed(5)
    plain = transformer(**ARGS)
    file = tmp_path / "base.safetensors"
    exported = {name: weight.detach().clone() for name, weight in plain.named_parameters()}
    save_file({**exported, "rule.lr": torch.ones(1)}, file)
    module = build_module(settings(weights=str(file)).model, 0)
    x = torch.randn(4, 5, 3)
    assert torch.equal(module(x), plain(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"layers": ["boddy.*"]}, r"layers = 'boddy\.\*' matches nothing: "),
        (
            {"freeze": True, "learned": ["head.wieght"]},
            "learned = 'head.wieght' matches nothing: did you mean 'head.weight'",
        ),
        ({"weights": "nowhere.safetensors"}, "nowhere.safetensors"),
        ({"build": "trainers.models:transformr"}, "did you mean transformer"),
    ],
)
def test_each_mistake_is_reported(options, message):
    with pytest.raises(ValueError, match=message):
        lora(**{"build": "trainers.models:transformer", "args": ARGS, **options})


def test_weights_of_another_model_are_refused(tmp_path):
    save_file({"other": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"of another model: .*body.* are missing, \['other'\] are unknown"):
        lora("trainers.models:transformer", args=ARGS, weights=str(tmp_path / "other.safetensors"))


def test_recompute_is_one_of_the_settings_of_a_run():
    plain, recomputed = settings(), settings()
    recomputed = replace(recomputed, model=replace(recomputed.model, recompute=("body.*",)))
    before = reproducibility_key(plain)
    del before["model"]["recompute"]  # as written by a version without this setting
    check_same_settings(before, plain)
    check_same_settings(reproducibility_key(recomputed), recomputed)
    with pytest.raises(SettingsChanged, match=r"model\.recompute was \[\] and is \['body\.\*'\]"):
        check_same_settings(reproducibility_key(plain), recomputed)
    with pytest.raises(SettingsChanged, match="model"):
        check_same_settings(reproducibility_key(recomputed), plain)
