"""Attention by the one kernel of torch that can be differentiated twice, in any number of threads."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch.nn.attention import SDPBackend, sdpa_kernel


class _MathKernel:
    """Torch's choice of kernels belongs to the process: the first thread to come in makes it, the last one restores it.

    With a context manager of its own, each thread would restore what another had set: one would lose the math
    kernel in the midst of its loss, and the process might keep it for good.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._chosen = ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._inside == 0:
                self._chosen.enter_context(sdpa_kernel(SDPBackend.MATH))
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._chosen.close()


math_attention = _MathKernel()
"""A context in which ``scaled_dot_product_attention`` runs by torch's math kernel; threads may share it."""
