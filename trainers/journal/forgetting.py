"""Remove from the files of a branch what was learned from erased rounds, so that the next start learns without them."""

import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

from streams.atomic_files import replace_file, sync_path
from trainers.checkpoint import LATEST, list_checkpoints
from trainers.journal.jsonl import Line, LineReader, find_line
from trainers.journal.plans import UpdatePlan, read_plans
from trainers.journal.quarantine import Quarantine
from trainers.journal.run_files import RunFiles

FORGOTTEN_DETAIL = "its task was erased with its entity"
LOST_DETAIL = "retention has removed its task, which would have to be learned again after an erasure before it"
DERIVED = ("report.json", "report.html", "regret.png", "ranks.json", "agent.json")
"""What a run writes about its rounds and writes again."""


def forget_rounds(files: RunFiles, rounds: Sequence[int], find_lost: Callable[[int], Iterable[int]]) -> int:
    """Remove what a branch has learned since the first of some rounds, and quarantine the rounds for good.

    Its learners continue from the newest checkpoint before that round, or from the beginning. The decisions that
    depended on timing are kept, as for a replay. A kill on the way leaves files from which a second call continues.

    Args:
        files: of the branch.
        rounds: whose tasks are erased, in ascending order; at least one.
        find_lost: returns the rounds from a given one on whose tasks retention has removed.

    Returns:
        The number of rounds that the branch has learned then.
    """
    first = rounds[0]
    quarantine_rounds(files, rounds, FORGOTTEN_DETAIL)
    _split_updates(files.update_log, rounds)
    _rewrite(files.rollback_log, lambda line: line if line["round"] <= first else None)
    _rewrite(files.tuning_log, lambda line: _without_losses(line) if line.get("round", 0) > first else line)
    left = _remove_checkpoints(files.checkpoints, first)
    _rewrite(files.checkpoint_log, lambda line: line if line["round"] <= first else None)
    lost = sorted(set(find_lost(left)).difference(rounds))
    quarantine_rounds(files, lost, LOST_DETAIL)
    _split_updates(files.update_log, lost)
    _truncate_rounds(files.rounds, min([first, *lost]))
    derived = [*files.own.glob("*.safetensors"), *files.own.glob("*.heartbeat")]
    derived += [files.leader, files.served_leader, files.comparators, files.sums, Path(f"{files.sums}.json")]
    for path in [*derived, *(files.own / name for name in DERIVED)]:
        path.unlink(missing_ok=True)
    sync_path(files.own)
    return left


def quarantine_rounds(files: RunFiles, rounds: Sequence[int], detail: str) -> None:
    """Log that rounds are quarantined since before they were learned, and take what was said of them from the logs."""
    gone, path = set(rounds), files.quarantine_log
    if not gone:
        return
    known = LineReader(path).refresh()
    done = {line["round"] for line in known if line.get("reason") == "forgotten"}
    now = time.time()
    own = [Quarantine(round, round, "forgotten", detail, now) for round in rounds if round not in done]
    lines = [*({"event": "quarantine", **one._asdict(), "settings": ""} for one in own)]
    lines += [_without_detail(line) if line.get("round") in gone else line for line in known]
    # Without this event, the next start would count the end of the last process as a death.
    _write(path, [*lines, *([] if lines[-1] == {"event": "stop"} else [{"event": "stop"}])])
    requests = files.quarantine_requests
    _rewrite(requests, lambda line: {**line, "reason": ""} if line["round"] in gone else line)


def _without_detail(line: Line) -> Line:
    """Return the line of a quarantine without its exception or the operator's reason."""
    return {**line, "detail": ""} if line.get("reason", "forgotten") != "forgotten" else line


def _split_updates(path: Path, rounds: Collection[int]) -> None:
    """Let no logged update contain one of the rounds, so that those after it keep the update that they had."""
    if not path.exists():
        return
    found = [part for plan in read_plans(path) for part in _split(plan, set(rounds))]
    _write(path, [plan._asdict() for plan in found])


def _split(plan: UpdatePlan, gone: set[int]) -> Iterator[UpdatePlan]:
    if not plan.rounds or not gone.intersection(range(plan.round, plan.round + plan.rounds)):
        yield plan
        return
    first = plan.round
    for round in range(plan.round, plan.round + plan.rounds + 1):
        if round in gone or round == plan.round + plan.rounds:
            if round > first:
                yield UpdatePlan(first, round - first)
            first = round + 1


def _without_losses(line: Line) -> Line:
    """Return a decision of a race without the losses that led to it."""
    return {key: value for key, value in line.items() if key not in ("raced", "mean_losses", "losers")}


def _remove_checkpoints(folder: Path, first: int) -> int:
    """Remove the checkpoints that have learned the round ``first``; return the rounds of the newest one left, or 0."""
    saved = list_checkpoints(folder)
    for unfinished in folder.glob(".*.unfinished"):
        shutil.rmtree(unfinished)
    for rounds in [one for one in saved if one > first]:
        shutil.rmtree(folder / str(rounds))
    left = max((one for one in saved if one <= first), default=0)
    if left:
        replace_file(folder / LATEST, f"{left}\n".encode(), durable=True)
    else:
        (folder / LATEST).unlink(missing_ok=True)
    return left


def _truncate_rounds(path: Path, first: int) -> None:
    if path.exists():
        os.truncate(path, find_line(path, lambda line: bool(line["round"] >= first)))
        sync_path(path)


def _rewrite(path: Path, change: Callable[[Line], Line | None]) -> None:
    """Replace each line of a file by what ``change`` returns for it, and remove it if that is None."""
    if path.exists():
        _write(path, [new for line in LineReader(path).lines() if (new := change(line)) is not None])


def _write(path: Path, lines: Iterable[Line]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line, allow_nan=False, separators=(",", ":")) + "\n" for line in lines)
    replace_file(path, text.encode(), durable=True)
