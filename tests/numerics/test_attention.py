import threading

import pytest
import torch
from torch import nn

import online_meta as om

DEADLINE = 30


def kernels() -> tuple[bool, bool, bool]:
    """Which kernels torch may choose from: flash, memory-efficient, math."""
    allowed = torch.backends.cuda
    return allowed.flash_sdp_enabled(), allowed.mem_efficient_sdp_enabled(), allowed.math_sdp_enabled()


MATH_ALONE = (False, False, True)


class Halting(nn.Module):
    """Says when it is inside, and stays there until it is told to go on."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.inside, self.go_on, self.seen = threading.Event(), threading.Event(), []

    def __deepcopy__(self, _memo):
        return self  # events cannot be copied, and this one has no state that a copy would have to keep apart

    def forward(self, x):
        self.inside.set()
        assert self.go_on.wait(DEADLINE)
        self.seen.append(kernels())
        return self.weight * x


def call(module):
    """Begin a call of ``module`` in a thread, and return once it is inside."""
    weights = {"weight": torch.ones(())}
    thread = threading.Thread(target=om.model_output(module), args=(weights, torch.ones(2)), daemon=True)
    thread.start()
    assert module.inside.wait(DEADLINE)
    return thread


def finish(module, thread):
    module.go_on.set()
    thread.join(DEADLINE)
    assert not thread.is_alive()


@pytest.mark.parametrize("first_to_leave", [0, 1])
def test_threads_share_the_math_kernel_and_the_last_one_gives_torch_its_choice_back(first_to_leave):
    before = kernels()
    assert before != MATH_ALONE
    modules = [Halting(), Halting()]
    threads = [call(module) for module in modules]
    last = 1 - first_to_leave
    finish(modules[first_to_leave], threads[first_to_leave])
    finish(modules[last], threads[last])
    assert [module.seen for module in modules] == [[MATH_ALONE], [MATH_ALONE]]
    assert kernels() == before


def test_a_model_that_fails_gives_torch_its_choice_back():
    before = kernels()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        om.model_output(nn.Linear(3, 1))({"weight": torch.ones(1, 3), "bias": torch.ones(1)}, torch.ones(2, 4))
    assert kernels() == before
