"""Time cold starts in fresh processes: imports, and the time to the first meta-step with ``how="auto"``.

``python -m tests.benchmarks.starts`` runs the sinusoid until its compiled program is in use, and prints a JSON line.
"""

import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterable
from statistics import median
from typing import Any

IMPORT = "import time; began = time.perf_counter(); import {}; print(time.perf_counter() - began)"
WAIT_SECONDS = 180


def time_imports(packages: Iterable[str], rounds: int = 3) -> dict[str, float | None]:
    """Return the median import time of each package over fresh processes; None if it is missing."""
    found: dict[str, list[float]] = {package: [] for package in packages}
    for _ in range(rounds):
        for package, seconds in found.items():
            command = [sys.executable, "-c", IMPORT.format(package)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                seconds.append(float(done.stdout.split()[-1]))
    return {package: median(seconds) if seconds else None for package, seconds in found.items()}


def time_first_start() -> dict[str, Any]:
    """Return the seconds from the start of a process to its first meta-step, and to that of the compiled program."""
    command = [sys.executable, "-m", "tests.benchmarks.starts", str(time.time())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(launched: float) -> None:
    """Import the package, and run meta-steps while the compiler works in the background."""
    imported = time.perf_counter()
    import torch

    import online_meta as om

    imported = time.perf_counter() - imported

    from tests.benchmarks.contestants import stack_tasks
    from tests.benchmarks.works import WORKS

    torch.set_num_threads(1)
    events = _Events()
    logging.getLogger("online_meta").addHandler(events)
    logging.getLogger("online_meta").setLevel(logging.INFO)
    work = WORKS["sinusoid_k5"]
    inner = om.Inner(om.model_loss(work.module(), work.loss), om.rules.sgd(lr=work.lr), work.steps)
    meta, tasks = inner.init(work.weights()), stack_tasks([work.task(seed) for seed in range(work.tasks)])
    mean = om.over_tasks(om.exact(inner), "auto")

    def step() -> float:
        began = time.perf_counter()
        mean(meta, tasks)
        return time.perf_counter() - began

    step()
    first = time.time() - launched
    taken = [step() for _ in range(5)]
    while not events.ended and time.time() - launched < WAIT_SECONDS:
        step()
    ended = time.time() - launched
    after = [step() for _ in range(21)]
    found = {"import": imported, "first_step": first, "step_before": median(taken), "step_after": median(after)}
    print(json.dumps({**found, "compiled_after": ended if events.ended else None, "log": events.messages}))


class _Events(logging.Handler):
    """Collect the messages of the package while it selects the fastest batching mode."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    @property
    def ended(self) -> bool:
        """Whether the compiled program has been tried, or the compiler has failed."""
        return any(line.startswith("compiled: ") or "; keeping batching mode" in line for line in self.messages)

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


if __name__ == "__main__":
    main(float(sys.argv[1]))
