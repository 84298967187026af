"""Random numbers of models and rules (dropout, masks) as a function of the task and the step."""

import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch

from online_meta.replay import generator
from online_meta.types import Batch

INIT_STEP = 0
"""The step that stands for the beginning of the inner loop; inner step k draws as ``k + 1``."""

_generator_lock = threading.RLock()


@contextmanager
def seeded(batch: Batch, step: int) -> Iterator[None]:
    """Let torch's random numbers be a function of the batch's bytes and ``step``; leave its generators as they were.

    What is computed again, going back, then sees what the first pass saw; and so does a round that is played again.
    Torch's generators belong to the process, so threads take turns.
    """
    devices = [batch.x.device] if batch.x.device.type == "cuda" else []
    with _generator_lock, torch.random.fork_rng(devices):
        torch.manual_seed(int(generator(_checksum(batch), step).integers(2**32)))
        yield


def capture_generator_state(devices: Sequence[int]) -> Callable[[], AbstractContextManager[None]]:
    """Return a context, to be entered any number of times, in which torch draws the numbers that it draws next now.

    ``devices`` are the CUDA devices that draw beside the CPU. Torch's generators are left as they were.
    """
    state, states = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]

    @contextmanager
    def restored() -> Iterator[None]:
        with _generator_lock, torch.random.fork_rng(devices):
            torch.set_rng_state(state)
            for device, known in zip(devices, states, strict=True):
                torch.cuda.set_rng_state(known, device)
            yield

    return restored


def _checksum(batch: Batch) -> int:
    checksum = 0
    for tensor in batch:
        checksum = zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes(), checksum)
    return checksum
