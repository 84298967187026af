"""A network that has something to say whenever it is used, in every way there is."""

import logging
import os
import warnings

from torch import Tensor, nn

log = logging.getLogger("talkative")


class Talkative(nn.Sequential):
    """Logs, warns, prints, and, as a rank, writes to standard error as a native library would."""

    def forward(self, x: Tensor) -> Tensor:
        log.info("forward")
        warnings.warn("the model warns", stacklevel=1)
        if "RANK" in os.environ:
            print("the model prints", flush=True)
            os.write(2, b"a native library writes\n")
        output: Tensor = super().forward(x)
        return output


def mlp(**_: object) -> nn.Module:
    return Talkative(nn.Linear(1, 16), nn.ReLU(), nn.Linear(16, 1))
