"""Frozen weights in a file: the same bits, read layer by layer, one file for all processes of a machine."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import online_meta as om
from online_meta.functional.stateless import DeferredWeight
from online_meta.memory import bytes_of
from online_meta.preflight.preflight import preflight
from online_meta.testing.compare import assert_close
from online_meta.testing.oracle import unrolled_maml
from tests.support.frozen_runs import (
    FEATURES,
    LENGTH,
    MODEL,
    frozen_settings,
    frozen_task,
    play_frozen,
    read_resident_share,
    watch_residence,
)
from tests.support.launch_ranks import run_ranks
from trainers import shared_weights
from trainers.build import build_inner, build_loss, build_model, build_module
from trainers.shared_weights import build_in, share_frozen_weights


def test_a_run_learns_and_scores_the_same_bits(tmp_path):
    (scores, state), (right_scores, right) = (play_frozen(frozen_settings(folder)) for folder in (tmp_path, ""))
    assert scores == right_scores
    assert state.keys() == right.keys()
    assert all(torch.equal(state[key], right[key]) for key in right)


def test_two_ranks_learn_the_same_bits_and_hold_a_layer_each(tmp_path):
    run_ranks("read_frozen_weights", tmp_path, 2)
    whole, *found = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole-0", "kept-0", "kept-1"))
    assert all(torch.equal(one[key], whole[key]) for one in found for key in whole)
    for rank in range(2):
        assert 0.2 < json.loads((tmp_path / f"kept-{rank}.json").read_text()) < 0.4  # 0.6 was to be reached.
    assert len([*(tmp_path / "kept").iterdir()]) == 1


def test_what_is_read_layer_by_layer_is_never_part_of_a_program(tmp_path):
    module, loss = build_model(frozen_settings(tmp_path))
    weights = {name: weight.detach() for name, weight in module.named_parameters() if name not in loss.frozen}
    with pytest.raises(RuntimeError, match="task by task"), torch.no_grad():
        torch.func.vmap(lambda x: loss.output(weights, x))(torch.zeros(2, 2, LENGTH, FEATURES))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("estimator", [om.exact, partial(om.exact, rematerialise=True), om.first_order])
def test_the_meta_gradient_has_the_same_bits(tmp_path, estimator, precision):
    found = []
    for folder in (tmp_path, ""):
        settings = frozen_settings(folder, replace(MODEL, precision=precision))
        module, loss = build_model(settings)
        inner = build_inner(settings.inner, loss)
        found.append(estimator(inner)(inner.init(dict(module.named_parameters())), frozen_task(1)))
    (kept, whole) = found
    assert torch.equal(kept.loss, whole.loss)
    assert all(torch.equal(kept.grads.weights[name], whole.grads.weights[name]) for name in whole.grads.weights)


def test_the_meta_gradient_is_exact_in_float64(tmp_path):
    module, loss = build_model(frozen_settings(tmp_path))
    inner = om.Inner(loss, om.rules.sgd(lr=0.1), 2, ("*lora*",))
    weights = {name: weight.detach().double() for name, weight in module.named_parameters() if name not in loss.frozen}
    task = om.Task(*(om.Batch(batch.x.double(), batch.y.double()) for batch in frozen_task(2)))
    right = unrolled_maml(module.double(), "mse", weights, task, lr=0.1, steps=2, fast=("*lora*",))
    assert_close(om.exact(inner)(inner.init(weights), task).grads.weights, right.grads.weights, 1e-10)


def resident_shares(tmp_path, *, drop):
    """Return the largest shares of the file that are resident while a meta-gradient is computed, and a score."""
    settings = frozen_settings(tmp_path)
    module = build_module(settings.model, 0)
    kept = share_frozen_weights(module, tmp_path)
    (file,) = tmp_path.iterdir()
    shares = [read_resident_share(file)]
    loss = build_loss(settings.model, module, watch_residence(kept, file, shares, drop=drop))
    inner = om.Inner(loss, om.rules.sgd(lr=0.1), 1, ("*lora*",))
    start = inner.init(dict(module.named_parameters()))
    kept.release(kept.tensors)
    del shares[:]
    om.exact(inner)(start, frozen_task(0))
    gradient = max(shares)
    del shares[:]
    loss.evaluate(start.weights, frozen_task(0).query)
    return gradient, max(shares), loss


def test_one_layer_at_a_time_is_resident(tmp_path):
    gradient, score, loss = resident_shares(tmp_path, drop=True)
    assert 0.2 < gradient < 0.4  # One of four layers, and pages around it that the system reads at the same time.
    assert 0.2 < score < 0.4
    constants = bytes_of(loss.tensors.constants)
    assert 0.24 < loss.constant_bytes / constants < 0.3
    assert loss.without_recompute.constant_bytes == constants


def test_all_layers_stay_resident_if_nothing_drops_them(tmp_path):
    assert min(resident_shares(tmp_path, drop=False)[:2]) > 0.95


def test_processes_share_one_file_and_a_damaged_one_is_written_again(tmp_path):
    def share():
        module = build_module(MODEL, 0)
        right = {name: weight.detach().clone() for name, weight in module.named_parameters()}
        kept = share_frozen_weights(module, tmp_path)
        assert all(torch.equal(weight, right[name]) for name, weight in module.named_parameters())
        (file,) = tmp_path.iterdir()
        return kept, file, file.stat().st_ino

    _, file, first = share()
    assert share()[2] == first
    assert file.stat().st_mode & 0o777 == 0o600
    with file.open("r+b") as opened:
        opened.seek(5000)
        opened.write(b"damaged")
    assert share()[2] != first
    file.write_bytes(file.read_bytes()[:-1])
    share()


def count_mapped_bytes(folder):
    """Return the bytes of this process's memory that are files of a folder."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    return sum(end - begin for begin, end in spans)


@pytest.mark.parametrize("in_files", [True, False])
def test_a_model_is_built_in_files(tmp_path, in_files):
    large = replace(MODEL, args={**MODEL.args, "args": {**MODEL.args["args"], "width": 512}})
    with build_in(str(tmp_path) if in_files else ""):
        module = build_module(large, 0)
    share = count_mapped_bytes(tmp_path) / bytes_of(dict(module.named_parameters()))
    assert 0.9 < share < 1.1 if in_files else share == 0
    assert not [*tmp_path.iterdir()]
    right = dict(build_module(large, 0).named_parameters())
    assert all(torch.equal(weight, right[name]) for name, weight in module.named_parameters())


def test_a_write_to_a_weight_changes_no_other_process(tmp_path):
    kept, again = (share_frozen_weights(build_module(MODEL, 0), tmp_path) for _ in range(2))
    name = next(iter(kept.tensors))
    before = again.tensors[name].clone()
    kept.tensors[name].add_(1.0)
    assert torch.equal(again.tensors[name], before)


def test_the_checks_of_a_model_read_its_frozen_weights_from_a_file(tmp_path):
    module, loss = build_model(frozen_settings(tmp_path))
    inner = om.Inner(loss, om.rules.sgd(lr=0.1), 1, ("*lora*",))
    found = preflight(inner, inner.init(dict(module.named_parameters())), [frozen_task(0)])
    assert found.problems == ()


class Peeks(nn.Module):
    """Uses the weight of a layer without calling the layer."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(3, 1 << 15, bias=False).requires_grad_(False)
        self.head = nn.Linear(1 << 15, 1)

    def forward(self, x):
        return self.head(nn.functional.linear(x, self.wide.weight))


def test_a_weight_that_is_used_outside_of_its_layer_is_refused(tmp_path):
    module = Peeks()
    kept = share_frozen_weights(module, tmp_path)
    loss = om.model_loss(module, "mse", recompute=("wide",), kept=kept)
    with pytest.raises(ValueError, match="used outside of its layer"):
        loss.output({n: w.detach() for n, w in module.named_parameters() if w.requires_grad}, torch.zeros(2, 3))


def test_weights_that_are_given_by_name_replace_those_of_the_file(tmp_path):
    module, loss = build_model(frozen_settings(tmp_path))
    x = frozen_task(0).query.x
    given = {name: 0.9 * weight.detach() for name, weight in module.named_parameters()}
    right = torch.func.functional_call(module, given, (x,))
    assert torch.allclose(loss.output(given, x), right, rtol=1e-5, atol=1e-6)


def test_a_tied_weight_is_read_by_each_of_its_layers(tmp_path):
    module = nn.Sequential(nn.Linear(3, 128), nn.Linear(128, 128, bias=False), nn.Linear(128, 128, bias=False))
    module[2].weight = module[1].weight
    module[1].requires_grad_(False)
    right, x = module(torch.ones(2, 3)), torch.ones(2, 3)
    kept = share_frozen_weights(module, tmp_path)
    weights = {name: weight.detach() for name, weight in module[0].named_parameters("0")}
    for recompute in ([1], [1, 2]):
        loss = om.model_loss(module, "mse", recompute=tuple(map(str, recompute)), kept=kept)
        assert torch.equal(loss.output(weights, x), right)


@pytest.mark.parametrize(
    ("change", "folder", "message"),
    [
        ({"recompute": ()}, "here", "frozen_folder = .* needs .* recompute"),
        ({}, "file/here", "frozen weights cannot be kept in .*: Not a directory"),
    ],
)
def test_mistakes_are_explained(tmp_path, change, folder, message):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=message):
        build_model(frozen_settings(tmp_path / folder, replace(MODEL, **change)))


def test_a_full_disk_is_explained_and_leaves_no_file(tmp_path, monkeypatch):
    def fill(file, weights):
        file.write(b"0")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shared_weights, "_write", fill)
    with pytest.raises(ValueError, match="No space left"):
        share_frozen_weights(build_module(MODEL, 0), tmp_path)
    assert not [*tmp_path.iterdir()]


def test_a_deferred_weight_says_what_it_is_and_computes_nothing():
    weight = DeferredWeight.make(torch.ones(2, 3), torch.device("cpu"), torch.float64)
    assert (weight.shape, weight.dtype, weight.is_floating_point()) == ((2, 3), torch.float64, True)
    assert torch.equal(weight.fetch(), torch.ones(2, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="layer by layer"):
        weight + 1
