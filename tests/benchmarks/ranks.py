"""Start several ranks that time themselves."""

import json
import os
import subprocess
from collections.abc import Sequence

from tests.support.launch_ranks import places

MARK = "SECONDS"
"""The first word of the line that rank 0 prints, before a JSON list."""


def time_ranks(command: Sequence[str], world: int) -> list[float]:
    """Return the seconds that rank 0 of ``world`` ranks prints; all run the command. Raises ``RuntimeError``."""
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **place},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for place in places(world)
    ]
    printed = ranks[0].communicate(timeout=600)[0]
    for rank in ranks[1:]:
        rank.communicate(timeout=600)
    lines = [line for line in printed.splitlines() if line.startswith(MARK)]
    if not lines:
        raise RuntimeError(f"rank 0 printed no times: {' '.join(command)}")
    found: list[float] = json.loads(lines[0].removeprefix(MARK))
    return found
