"""A repair that is killed: repaired parts stay repaired, and a second repair does the rest."""

from pathlib import Path

from streams.history import archive_index, ledger
from streams.history.archive_index import Location
from streams.history.history import History
from streams.history.sealing import seal_next
from streams.history.verify import rebuild_ledger, repair, verify
from tests.crash.checks import Acknowledged, check
from tests.crash.scenarios import SEALING, Acknowledge, append, keep


def damage(folder: Path, acknowledge: Acknowledge) -> None:
    """Damage data with a second copy: a chunk of a segment, a sealed payload, and a payload without a round."""
    with History.open(folder, write=True) as history:
        append(history, list(range(9)), acknowledge)
        while seal_next(history, SEALING):
            pass
        with history.borrow_writer() as writer:
            writer.execute("UPDATE payloads SET payload = zeroblob(9) WHERE round = 5")
            writer.execute("INSERT INTO payloads VALUES (99, x'00')")
        name = archive_index.list_segments(history.query)[0]
    files = [file for file in (folder / "archive" / "segments" / name).rglob("*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert not verify(folder).clean


def run_repair(folder: Path, acknowledge: Acknowledge) -> None:
    repair(folder, verify(folder))


def check_repaired(folder: Path, acknowledged: Acknowledged) -> None:
    run_repair(folder, lambda said: None)
    check(folder, acknowledged)


def lose_ledger(folder: Path, acknowledge: Acknowledge) -> None:
    """Delete the ledger, so that only the archive is left."""
    keep(folder, acknowledge)
    for file in folder.glob(f"{ledger.FILE}*"):
        file.unlink()


def rebuild(folder: Path, acknowledge: Acknowledge) -> None:
    if not (folder / ledger.FILE).exists():
        rebuild_ledger(folder, Location())


def check_rebuilt(folder: Path, acknowledged: Acknowledged) -> None:
    rebuild(folder, lambda said: None)
    check(folder, acknowledged)
