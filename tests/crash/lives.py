"""All lives by name: what runs, what prepares it, what the next start does, and what must hold then."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tests.crash.checks import Acknowledged, check
from tests.crash.edges import check_letters, fill_spool, make_spool_life, write_letters
from tests.crash.random_lives import make_random_life
from tests.crash.repairs import check_rebuilt, check_repaired, damage, lose_ledger, rebuild, run_repair
from tests.crash.scenarios import Play, ingest, keep, recover, retain, seal
from tests.crash.tables import make_table_life
from tests.support.entity_tables import FORMATS

RANDOM = "random-"


class Life(NamedTuple):
    """``prepare`` gets no faults; ``play`` does; ``again`` is the next start, and may get a fault of its own."""

    play: Play
    check: Callable[[Path, Acknowledged], None] = check
    prepare: Play | None = None
    again: Play = recover

    def part(self, name: str) -> Play:
        """Return "prepare", "play" or "again"."""
        found: Play = getattr(self, name)
        return found


HISTORY = {"ingest": Life(ingest), "seal": Life(seal), "retain": Life(retain, prepare=keep)}
"""The lives in which each step is an acknowledgement or changes acknowledged data."""

_move, _check_moved = make_spool_life("move")
_keep, _check_kept = make_spool_life("keep")
SCENARIOS = HISTORY | {
    "repair": Life(run_repair, check_repaired, damage, run_repair),
    "rebuild": Life(rebuild, check_rebuilt, lose_ledger, rebuild),
    "move": Life(_move, _check_moved, fill_spool, _move),
    "keep": Life(_keep, _check_kept, fill_spool, _keep),
    "letters": Life(partial(write_letters, range(6)), check_letters, again=partial(write_letters, range(6, 11))),
}
for _format in FORMATS:
    _prepare, _play, _check = make_table_life(_format)
    SCENARIOS[f"table-{_format}"] = Life(_play, _check, _prepare, _play)


def find_life(name: str) -> Life:
    """Return the life with a name; ``random-<seed>`` is a random life."""
    return Life(make_random_life(name)) if name.startswith(RANDOM) else SCENARIOS[name]
