"""Equal requests get equal bits: decoded tensors start where torch allocates, at multiples of 64 bytes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor
from torch.utils._pytree import tree_leaves

from deploy.leader import read_leader
from deploy.processes.comparators import load_state
from online_meta.types import Batch, Task
from streams.formats import wire
from streams.history.history import decode_view
from streams.spec import InputSpec, Limits, TaskSpec
from trainers.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from trainers.journal.leader_file import encode_leader

NAMES = ("a", "b", "c")
SPEC = TaskSpec(x={name: InputSpec((3,), "float32") for name in NAMES}, y="real")
LIMITS = Limits(samples=50, elements=2000)


def make_batch(count: int) -> Batch:
    """Return samples whose tensors have odd sizes, so that their bytes do not start at multiples of anything."""
    return Batch({name: torch.randn(count, 3) for name in NAMES}, torch.randn(count))


def are_aligned(tree: Any) -> bool:
    found = [leaf.data_ptr() % 64 for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    assert found
    return not any(found)


def test_the_tensors_of_a_stored_task() -> None:
    for count in range(1, 12):
        task = Task(make_batch(count), make_batch(count + 1))
        payload = wire.encode(task)
        for decode in (wire.decode_payload, decode_view):
            found = decode(payload)
            assert are_aligned(found), decode
            for one, other in zip(tree_leaves(found), tree_leaves(task), strict=True):
                assert other is None or torch.equal(one, other)


def test_the_tensors_of_a_request() -> None:
    for count in range(1, 12):
        support, query = make_batch(count), make_batch(count)
        named = {f"support_x.{name}": support.x[name] for name in NAMES} | {"support_y": support.y}
        body = save(named | {f"query_x.{name}": query.x[name] for name in NAMES})
        assert are_aligned(wire.decode_support(body, SPEC, LIMITS))


@pytest.mark.parametrize("size", [1, 3, 7, 40])
def test_the_tensors_that_a_run_reads_back(tmp_path: Path, size: int) -> None:
    state = {name: torch.randn(size, 3) for name in NAMES}
    path = tmp_path / "leader.safetensors"
    path.write_bytes(encode_leader(state, 1))
    assert are_aligned(read_leader(path).state)
    assert are_aligned(load_state(path))
    save_checkpoint(tmp_path, Checkpoint(1, {"ftml": state}, {}), keep=1)
    assert are_aligned(load_checkpoint(tmp_path / "1").learners)
