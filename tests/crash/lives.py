"""All lives by name: what is played, what comes before it, what a next start does, and what must hold then."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tests.crash.chance import live_by_chance
from tests.crash.checks import Acknowledged, check
from tests.crash.edges import both, check_letters, fill_spool, write_letters
from tests.crash.mending import check_mended, check_rebuilt, damage, lose_ledger, mend, rebuild
from tests.crash.scenarios import Play, ingest, keep, recover, retain, seal

RANDOM = "random-"


class Life(NamedTuple):
    """``prepare`` is never harmed; ``play`` is; ``again`` follows what was harmed, and may be harmed in its turn."""

    play: Play
    check: Callable[[Path, Acknowledged], None] = check
    prepare: Play | None = None
    again: Play = recover

    def part(self, name: str) -> Play:
        """Return "prepare", "play" or "again"."""
        found: Play = getattr(self, name)
        return found


HISTORY = {"ingest": Life(ingest), "seal": Life(seal), "retain": Life(retain, prepare=keep)}
"""Those of which each step is an acknowledgement or changes what was acknowledged."""

_move, _check_moved = both("move")
_keep, _check_kept = both("keep")
SCENARIOS = HISTORY | {
    "repair": Life(mend, check_mended, damage, mend),
    "rebuild": Life(rebuild, check_rebuilt, lose_ledger, rebuild),
    "move": Life(_move, _check_moved, fill_spool, _move),
    "keep": Life(_keep, _check_kept, fill_spool, _keep),
    "letters": Life(partial(write_letters, range(6)), check_letters, again=partial(write_letters, range(6, 11))),
}


def find_life(name: str) -> Life:
    """Return the life of a name; ``random-<seed>`` is one by chance."""
    return Life(live_by_chance(name)) if name.startswith(RANDOM) else SCENARIOS[name]
