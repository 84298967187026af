"""A network that logs, warns and prints at each forward; it also sets the clock of its rank's statistics."""

import logging
import os
import warnings
from pathlib import Path
from types import SimpleNamespace

from torch import Tensor, nn

from trainers.distributed import rank_stats

log = logging.getLogger("talkative")


class Talkative(nn.Sequential):
    """Logs, warns and prints, and, in a rank, writes to standard error like a native library."""

    def forward(self, x: Tensor) -> Tensor:
        log.info("forward")
        warnings.warn("the model warns", stacklevel=1)
        if "RANK" in os.environ:
            print("the model prints", flush=True)
            os.write(2, b"a native library writes\n")
        output: Tensor = super().forward(x)
        return output


def mlp(clock: str, **_: object) -> nn.Module:
    """Return the network; from now on the rank's statistics use the time that the file ``clock`` holds."""
    rank_stats.time = SimpleNamespace(monotonic=lambda: float(Path(clock).read_text()))  # type: ignore[assignment]
    return Talkative(nn.Linear(1, 16), nn.ReLU(), nn.Linear(16, 1))
