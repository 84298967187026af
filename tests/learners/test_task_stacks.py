"""Tasks that are kept as rows of stacked tensors: the same tasks, and the same sums to the bit."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from online_meta.batches import map_tensors
from online_meta.batching.plan import ExecutionPlan, signature_of
from online_meta.batching.task_sum import TaskSum, is_finite
from online_meta.replay._task_stacks import FIRST_ROWS, TaskStack
from online_meta.testing.learner_problems import frozen, setup, task

SETUP = setup()
TASKS = [task(k, support=4, query=5) for k in range(9)]
ROUNDS = [3, 8, 1, 5]


@pytest.fixture
def stack():
    found = TaskStack(1 << 20)
    for round, one in enumerate(TASKS):
        found.add(round, one)
    return found


def is_equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(tree_leaves(one), tree_leaves(other), strict=True))


def test_it_is_a_sequence_of_the_tasks(stack):
    found = stack.find(ROUNDS)
    assert len(found) == 4
    assert all(is_equal(one, TASKS[round]) for one, round in zip(found, ROUNDS, strict=True))
    assert [is_equal(one, TASKS[round]) for one, round in zip(found[1:3], ROUNDS[1:3], strict=True)] == [True, True]
    assert all(leaf.data_ptr() % 64 == 0 for one in found for leaf in tree_leaves(one)), "see copy_aligned"


def test_the_first_task_fills_up_a_stack(stack):
    stacked = stack.find(ROUNDS).stack(6)
    right = [torch.stack(each) for each in zip(*(tree_leaves(TASKS[k]) for k in [*ROUNDS, 3, 3]), strict=True)]
    assert all(torch.equal(one, other) for one, other in zip(tree_leaves(stacked), right, strict=True))


def test_what_it_has_not_kept_is_not_found(stack):
    assert stack.find([3, 9]) is None
    assert stack.find([]) is None
    stack.add(9, task(9, support=3, query=5))
    assert stack.find([9]) is None, "it has another signature"


def test_it_grows_up_to_its_limit():
    size = sum(leaf.nbytes for leaf in tree_leaves(TASKS[0]))
    stack = TaskStack(2 * FIRST_ROWS * size)
    for round in range(3 * FIRST_ROWS):
        stack.add(round, TASKS[round % len(TASKS)])
    last = 2 * FIRST_ROWS - 1
    assert is_equal(stack.find([last])[0], TASKS[last % len(TASKS)])
    assert stack.find([last + 1]) is None


def test_stacked_tasks_are_kept_as_each_alone():
    stack = TaskStack(1 << 30)
    stack.add(3, TASKS[3])
    rounds = [*range(3 * FIRST_ROWS), 5]
    stacked = map_tensors(lambda *leaves: torch.stack(leaves), *(TASKS[round % len(TASKS)] for round in rounds))
    stack.add_all(rounds, stacked)
    found = stack.find(rounds)
    assert all(is_equal(one, TASKS[round % len(TASKS)]) for one, round in zip(found, rounds, strict=True))
    stack.add(3 * FIRST_ROWS, TASKS[1])
    assert is_equal(stack.find([3 * FIRST_ROWS])[0], TASKS[1])
    assert is_equal(stack.find([3 * FIRST_ROWS - 1])[0], TASKS[(3 * FIRST_ROWS - 1) % len(TASKS)])


@pytest.mark.parametrize("rows", [3, 4, 6])
@pytest.mark.parametrize("batching", ["loop", "vmap", "traced"])
def test_a_sum_over_them_has_the_bits_of_the_sum_over_the_tasks(stack, batching, rows):
    weights = [1.0, 0.5, 2.0, 1.0]
    plan = ExecutionPlan(batching, rows, signature_of(TASKS[0]))
    sums = []
    for tasks in ([TASKS[round] for round in ROUNDS], stack.find(ROUNDS)):
        task_sum = TaskSum(SETUP.gradient)
        task_sum.follow([plan])
        sums.append(task_sum(SETUP.start, tasks, weights))
    assert frozen(sums[0].grads.weights) == frozen(sums[1].grads.weights)
    assert torch.equal(sums[0].loss, sums[1].loss)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.complex64])
def test_finiteness_is_exact(dtype):
    largest = torch.finfo(dtype).max
    assert is_finite({"a": torch.full((9,), largest, dtype=dtype)}, torch.ones(2))
    assert is_finite()
    for wrong in (torch.inf, -torch.inf, torch.nan):
        assert not is_finite([torch.ones(3), torch.tensor([1.0, wrong]).to(dtype)])
    assert not is_finite(torch.tensor([torch.inf, -torch.inf]).to(dtype))
