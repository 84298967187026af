import threading

import pytest
import torch
from torch import nn

import online_meta as om

DEADLINE = 30


def kernels() -> tuple[bool, bool, bool]:
    """Return which kernels torch may choose from: flash, memory-efficient, math."""
    allowed = torch.backends.cuda
    return allowed.flash_sdp_enabled(), allowed.mem_efficient_sdp_enabled(), allowed.math_sdp_enabled()


ONLY_MATH = (False, False, True)


class BlockingModel(nn.Module):
    """A model whose forward signals that it was entered and waits for permission to continue."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.inside, self.proceed, self.seen = threading.Event(), threading.Event(), []

    def __deepcopy__(self, _memo):
        return self  # events cannot be copied, and this model has no other state to copy

    def forward(self, x):
        self.inside.set()
        assert self.proceed.wait(DEADLINE)
        self.seen.append(kernels())
        return self.weight * x


def call(module):
    """Call ``module`` in a thread, and return the thread once forward was entered."""
    weights = {"weight": torch.ones(())}
    thread = threading.Thread(target=om.model_output(module), args=(weights, torch.ones(2)), daemon=True)
    thread.start()
    assert module.inside.wait(DEADLINE)
    return thread


def finish(module, thread):
    module.proceed.set()
    thread.join(DEADLINE)
    assert not thread.is_alive()


@pytest.mark.parametrize("first_to_leave", [0, 1])
def test_threads_share_the_math_kernel_and_the_last_one_restores_the_others(first_to_leave):
    before = kernels()
    assert before != ONLY_MATH
    modules = [BlockingModel(), BlockingModel()]
    threads = [call(module) for module in modules]
    last = 1 - first_to_leave
    finish(modules[first_to_leave], threads[first_to_leave])
    finish(modules[last], threads[last])
    assert [module.seen for module in modules] == [[ONLY_MATH], [ONLY_MATH]]
    assert kernels() == before


def test_a_failing_model_restores_the_kernels():
    before = kernels()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        om.model_output(nn.Linear(3, 1))({"weight": torch.ones(1, 3), "bias": torch.ones(1)}, torch.ones(2, 4))
    assert kernels() == before
