"""online-meta verify: check a whole history, and repair what has a second copy."""

import json
import sys
from pathlib import Path
from typing import Any

import click
from rich.progress import Progress

from deploy.exits import BROKEN
from streams.history import ledger
from streams.history.archive_index import ARCHIVE_FOLDER, Location
from streams.history.verify import Verification, rebuild_ledger, repair, verify


@click.command("verify")
@click.argument("history_dir", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--repair", "mend", is_flag=True, help="Repair what has a second copy; the daemon must be stopped.")
@click.option("--archive", metavar="FOLDER|URL", help="Location of the archive, if the ledger that records it is lost.")
def command(history_dir: Path, as_json: bool, mend: bool, archive: str | None) -> int:
    """Read every round of the history in HISTORY_DIR, ledger and archive; check every checksum and the order.

    Exit code 70: the history is damaged. With --repair, damaged rounds of the ledger are restored from the archive and
    damaged segments of the archive from the ledger; a missing ledger is rebuilt from the archive. Damage without a
    second copy is listed and left unchanged.
    """
    results: dict[str, Any] = {}
    if mend and not (history_dir / ledger.FILE).exists() and (archive or (history_dir / ARCHIVE_FOLDER).exists()):
        results["rebuilt"] = rebuild_ledger(history_dir, Location(archive))
    found = _read_all(history_dir, as_json)
    if mend and not found.clean:
        repairs = repair(history_dir, found)
        results["repairs"] = repairs._asdict()
        found = _read_all(history_dir, as_json)
    if as_json:
        click.echo(json.dumps({"clean": found.clean, **found._asdict(), **results}))
    else:
        click.echo("\n".join([*_describe_repairs(results), describe_damage(found, history_dir)]))
    return 0 if found.clean else BROKEN


def _read_all(folder: Path, quiet: bool) -> Verification:
    with Progress(transient=True, disable=quiet or not sys.stderr.isatty()) as progress:
        bar = progress.add_task("reading rounds", total=None)
        return verify(folder, lambda done, total: progress.update(bar, completed=done, total=total))


def _describe_repairs(results: dict[str, Any]) -> list[str]:
    """Return one line for each kind of repair that was made."""
    lines = []
    if "rebuilt" in results:
        lines.append(f"the ledger was rebuilt from the archive, with {results['rebuilt']} rounds")
    repairs = results.get("repairs", {})
    words = {
        "from_archive": "rounds whose copies in the ledger were damaged, now read from the archive",
        "segments": "segments rewritten from the ledger",
        "strays": "payloads that belong to no round, removed",
        "lost": "damaged segments without a copy in the ledger: restore them from a backup",
    }
    lines += [f"{words[kind]}: {_join(values)}" for kind, values in repairs.items() if values]
    return lines


def describe_damage(found: Verification, folder: Path) -> str:
    """Return the result of a verification as text: one line per kind of damage."""
    if found.clean:
        return f"{folder}: {found.rounds} rounds, all intact and in order"
    kinds = {name: values for name, values in found._asdict().items() if name != "rounds" and values}
    lines = [f"  {name}: {_join(values)}" for name, values in kinds.items()]
    return "\n".join([f"{folder}: {found.rounds} rounds, DAMAGED", *lines])


def _join(values: tuple[object, ...]) -> str:
    return ", ".join(str(value) for value in values)
