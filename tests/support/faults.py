"""A model that stops its rank at a chosen point of a meta-step or of a checkpoint."""

import copy
import json
import os
import signal
import sys
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from trainers.models import mlp

FORWARD = "forward"


class Fault(NamedTuple):
    """Rank ``rank`` receives ``signal`` just before the ``nth`` occurrence of ``event`` with ``what``.

    ``event`` is FORWARD, or an audit event of Python, such as "open", whose arguments contain ``what``.
    """

    rank: int
    event: str
    what: str = ""
    nth: int = 1
    signal: int = signal.SIGKILL


def arm(folder: Path, fault: Fault) -> None:
    """Make a fault happen once."""
    new = folder / "fault.new"
    new.write_text(json.dumps(fault))
    new.rename(folder / "fault.json")


def armed(folder: Path) -> bool:
    """Return whether the fault has not happened yet."""
    return (folder / "fault.json").exists()


class Watch:
    """Counts the events of this process towards the fault in ``folder``."""

    def __init__(self, folder: str) -> None:
        self.file = Path(folder) / "fault.json"
        self.seen: tuple[str, int] = ("", 0)
        sys.addaudithook(lambda event, given: self.note(event, given) if event != "os.kill" else None)

    def note(self, event: str, given: tuple[object, ...]) -> None:
        """Count an event, and send the signal at the chosen one."""
        if event not in (FORWARD, "open", "os.rename") or str(self.file) in map(str, given[:1]):
            return
        try:
            text = self.file.read_text()
        except FileNotFoundError:
            return
        fault = Fault(*json.loads(text))
        if os.environ.get("RANK") != str(fault.rank) or event != fault.event or fault.what not in str(given[:2]):
            return
        self.seen = (text, self.seen[1] + 1 if self.seen[0] == text else 1)
        if self.seen[1] == fault.nth:
            self.file.unlink()
            os.kill(os.getpid(), fault.signal)


class Faulty(nn.Module):
    """A model that notifies ``watch`` of each forward."""

    def __init__(self, model: nn.Module, watch: Watch) -> None:
        super().__init__()
        self.model = model
        self.__dict__["watch"] = watch

    def __deepcopy__(self, memo: dict[int, object]) -> "Faulty":
        copied = Faulty(nn.Identity(), self.__dict__["watch"])
        copied.model = copy.deepcopy(self.model, memo)
        return copied

    def forward(self, x: Tensor) -> Tensor:
        self.__dict__["watch"].note(FORWARD, ())
        return self.model(x)


def faulty(folder: str, **args: object) -> nn.Module:
    """Return an ``mlp`` that watches for the fault in ``folder``."""
    return Faulty(mlp(**args), WATCHES.setdefault(folder, Watch(folder)))


WATCHES: dict[str, Watch] = {}
"""One watch per folder: a process builds its model more than once, and audit hooks cannot be removed."""
