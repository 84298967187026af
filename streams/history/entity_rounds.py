"""Find the rounds of an entity in a history, and the rows that they say of it."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch.utils._pytree import tree_leaves

from online_meta.batches import concat_batches, select_samples
from online_meta.types import Batch
from streams.entities import find_entity, quote_key
from streams.history.history import History
from streams.history.predictions import find_predicted_rounds

_READ_ROUNDS = 64


def find_rounds(history: History, key: str) -> list[int]:
    """Return the rounds whose ids name an entity, in ascending order; reads every id once."""
    found = history.query("SELECT round, id FROM rounds WHERE instr(id, ?) > 0", (f"..{quote_key(key)}..",))
    return sorted(round for round, id in found if find_entity(id) == key)


def read_rows(history: History, rounds: Sequence[int]) -> Batch | None:
    """Return the rows of an entity, in the order in which its tasks brought them; None without rounds.

    The rows of a query set are new. A row of a support set is new unless an earlier task had it, because the support of
    a later task may be the entity's own past. That of a kept prediction is never new: some of its rows may have waited
    for their task. Rows with weight 0 are padding.

    Args:
        history: of the run.
        rounds: of the entity, in ascending order.

    Raises:
        HistoryError: if a round cannot be read, as when retention has removed it.
    """
    known: Counter[bytes] = Counter()
    found: Batch | None = None
    predicted = find_predicted_rounds(history, rounds)
    for first in range(0, len(rounds), _READ_ROUNDS):
        some = rounds[first : first + _READ_ROUNDS]
        for round, task in zip(some, history.tasks(some), strict=True):
            for part, batch in zip(("support", "query"), task, strict=True):
                if round in predicted and part == "support":
                    continue
                new = _take_new(batch, known, part == "query")
                found = new if found is None else concat_batches(found, new)
    return found


def _take_new(batch: Batch, known: Counter[bytes], all_new: bool) -> Batch:
    """Return the new rows of a batch, and count them as known."""
    if batch.weight is not None:
        batch = select_samples(batch, batch.weight > 0)
    before, counts, chosen = Counter(known), Counter[bytes](), []
    for index, row in enumerate(_read_bytes(batch)):
        counts[row] += 1
        if all_new or counts[row] > before[row]:
            known[row] += 1
            chosen.append(index)
    return select_samples(batch, torch.tensor(chosen, dtype=torch.int64))


def _read_bytes(batch: Batch) -> list[bytes]:
    """Return the bytes of each row."""
    parts = [part.contiguous().numpy() for part in tree_leaves((batch.x, batch.y))]
    return [b"".join(part.tobytes() for part in row) for row in zip(*parts, strict=True)]
