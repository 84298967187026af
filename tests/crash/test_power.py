"""After a power loss at any moment, everything acknowledged is there; anything else is complete or absent."""

import random
import shutil
from pathlib import Path

import pytest

from tests.crash.checks import check
from tests.crash.lives import HISTORY
from tests.crash.power import Life, lose_power, parse_life
from tests.crash.recording import record
from tests.crash.walker import Walker

STATES = {"ingest": 200, "seal": 100, "retain": 50}


@pytest.fixture(scope="module")
def lives(walker: Walker) -> dict[str, tuple[Path, Life]]:
    recorded = {name: record(walker, name) for name in HISTORY}
    return {name: (folder, parse_life(folder, calls)) for name, (folder, calls) in recorded.items()}


def survive(life: Life, folder: Path, seed: int, disk: Path) -> int:
    """Lose power once; return how many steps had been acknowledged."""
    chance = random.Random(seed)
    acknowledged = lose_power(life, chance.randrange(len(life.ops) + 1), chance, disk)
    try:
        check(disk / folder.name, acknowledged)
    finally:
        shutil.rmtree(disk)
    return len(acknowledged)


@pytest.mark.parametrize("scenario", HISTORY)
def test_a_power_loss_loses_nothing_acknowledged(
    walker: Walker, lives: dict[str, tuple[Path, Life]], scenario: str
) -> None:
    folder, life = lives[scenario]
    found = [survive(life, folder, seed, walker.folder / "disk") for seed in range(STATES[scenario])]
    assert len(set(found)) >= 3, "power losses must come early and late"


@pytest.mark.parametrize("scenario", HISTORY)
def test_a_disk_without_losses_equals_what_the_life_left(
    walker: Walker, lives: dict[str, tuple[Path, Life]], scenario: str
) -> None:
    """The recording misses no call that changes a file."""

    class LoseNothing(random.Random):
        def random(self) -> float:
            return 0.0

        def choice(self, choices):  # type: ignore[no-untyped-def]
            return max(choices)

    folder, life = lives[scenario]
    disk = walker.folder / "lucky"
    lose_power(life, len(life.ops), LoseNothing(), disk)
    left = {
        path.relative_to(folder): path for path in folder.rglob("*") if path.is_file() and path.name != "writer.lock"
    }
    built = {path.relative_to(disk / folder.name): path for path in (disk / folder.name).rglob("*") if path.is_file()}
    assert set(built) == {name for name in left if not str(name).endswith("-shm")}
    for name, path in built.items():
        assert path.read_bytes() == left[name].read_bytes(), name
    shutil.rmtree(disk)


def without_syncs(life: Life, *nodes: str) -> Life:
    """Return the life of a program that omits syncs of files ("data") or folders ("names")."""
    forgotten = {"data": lambda node: node not in life.folders, "names": lambda node: node in life.folders}
    ops = [
        op._replace(kind="cut", at=1 << 40) if op.kind == "sync" and any(forgotten[n](op.node) for n in nodes) else op
        for op in life.ops
    ]
    return life._replace(ops=[op._replace(kind="nothing") if op.at == 1 << 40 else op for op in ops])


@pytest.mark.parametrize("forgotten", ["data", "names"])
@pytest.mark.parametrize("scenario", ["ingest", "seal"])
def test_missing_syncs_are_detected(
    walker: Walker, lives: dict[str, tuple[Path, Life]], scenario: str, forgotten: str
) -> None:
    folder, life = lives[scenario]
    careless, lost = without_syncs(life, forgotten), 0
    for seed in range(30):
        try:
            survive(careless, folder, seed, walker.folder / "disk")
        except Exception:
            lost += 1
    assert lost > 5
