"""Make the random numbers of models and rules (dropout, masks) a function of the task and the step."""

import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch.utils._pytree import tree_leaves

from online_meta.batches import first_tensor, select_samples
from online_meta.functional.keyed import capture_keyed_state
from online_meta.replay import generator
from online_meta.types import Batch

INIT_STEP = 0
"""The step number used before the first inner step and for query losses; inner step k uses ``k + 1``."""

_generator_lock = threading.RLock()


@contextmanager
def seeded(batch: Batch, step: int) -> Iterator[None]:
    """Seed torch from the batch's bytes and ``step`` within this context; restore its generators afterwards.

    So a recomputation in the backward pass, or a repeated round, draws the same numbers. Torch's generators are global,
    so only one thread at a time is inside the context.
    """
    device = first_tensor(batch.x).device
    devices = [device] if device.type == "cuda" else []
    with _generator_lock, torch.random.fork_rng(devices):
        torch.manual_seed(int(generator(checksum(batch), step).integers(2**32)))
        yield


def capture_generator_state(devices: Sequence[int]) -> Callable[[], AbstractContextManager[None]]:
    """Capture the state of torch's generators; return a reusable context that starts from this state.

    ``devices`` are the CUDA devices whose generators count in addition to the CPU's. Capturing and leaving the context
    do not change the generators. Numbers drawn in a ``keyed`` context start from the captured state, too.
    """
    keyed_again = capture_keyed_state()
    state, states = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]

    @contextmanager
    def restored() -> Iterator[None]:
        with _generator_lock, torch.random.fork_rng(devices), keyed_again():
            torch.set_rng_state(state)
            for device, known in zip(devices, states, strict=True):
                torch.cuda.set_rng_state(known, device)
            yield

    return restored


def checksum(batch: Batch) -> int:
    """Return the CRC-32 of all bytes of a batch, without samples of weight 0 and without weights that are all 1."""
    total, weight = 0, batch.weight
    if weight is not None:
        batch = select_samples(batch, weight != 0)
        batch = batch._replace(weight=None) if bool((weight[weight != 0] == 1).all()) else batch
    for tensor in tree_leaves(batch):
        total = zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes(), total)
    return total
