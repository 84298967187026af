"""The history agrees with a dictionary as its model, whatever the operations and their order."""

import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from streams.history.errors import RoundDiscarded
from streams.history.history import History
from streams.history.retention import (
    RetentionSettings,
    compact,
    count_discarded,
    last_decision,
    retained_rounds,
    subsample,
)
from streams.history.sealing import SealingSettings, evict_payloads, remove_orphans, seal_next
from streams.history.verify import verify
from streams.types import Conflict, Receipt
from tests.crash.scenarios import payload_of, record_of

NUMBERS = st.integers(0, 40)


class HistoryWithModel(RuleBasedStateMachine):
    """Numbers stand for tasks. The model holds their rounds, the cursors, and which rounds are discarded."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.history = History.open(self.folder / "0", write=True)
        self.lives = 0
        self.numbers: list[int] = []
        self.others: set[int] = set()  # numbers first appended with other bytes
        self.cursors: dict[str, str] = {}
        self.thinned: set[int] = set()
        self.removed: set[int] = set()

    @initialize()
    def begin(self) -> None:
        assert len(self.history) == 0

    @rule(batch=st.lists(st.tuples(NUMBERS, st.booleans()), max_size=8))
    def append(self, batch: list[tuple[int, bool]]) -> None:
        """Append tasks. Some are known; some (False) have other bytes under a known id."""
        records = [record_of(n) if same else record_of(n)._replace(digest=b"?" * 32) for n, same in batch]
        answers = self.history.append(records)
        for (number, same), record, answer in zip(batch, records, answers, strict=True):
            known = number in self.numbers
            if not known:
                self.numbers.append(number)
                self.others |= set() if same else {number}
            round = self.numbers.index(number)
            as_kept = same != (number in self.others)
            expected = Receipt(record.id, round, duplicate=known) if as_kept else Conflict(record.id, round)
            assert answer == expected
            if record.cursor is not None:
                self.cursors[record.source] = record.cursor

    @rule()
    def reopen(self) -> None:
        self.history.close()
        self.history = History.open(self.history.path, write=True)

    @rule()
    def kill_process(self) -> None:
        """Continue with a copy of the current files, as after a kill."""
        self.lives += 1
        copy = self.folder / str(self.lives)
        shutil.copytree(self.history.path, copy, ignore=shutil.ignore_patterns("*-shm"))
        self.history.close()
        self.history = History.open(copy, write=True)
        assert remove_orphans(self.history) == []

    @rule(size=st.integers(1, 4))
    def seal(self, size: int) -> None:
        seal_next(self.history, SealingSettings(segment_rounds=size))

    @rule()
    def evict(self) -> None:
        evict_payloads(self.history, 0)

    @rule(most=st.integers(1, 6))
    def subsample_rounds(self, most: int) -> None:
        before = len(self.numbers) - len(self.thinned)
        taken = subsample(self.history, RetentionSettings(rounds=most))
        count = len(self.numbers)
        kept = retained_rounds(self.history.query, last_decision(self.history.query, count + 1)).tolist()
        if taken:
            assert taken == before - most
            assert len(kept) == most
            self.thinned = set(range(count)).difference(kept)

    @rule()
    def remove(self) -> None:
        compact(self.history, len(self.numbers), 3)
        self.removed = set(self.thinned)
        assert count_discarded(self.history.query) == len(self.removed)

    @rule()
    def verify(self) -> None:
        assert verify(self.history.path).clean

    @invariant()
    def agrees_with_the_model(self) -> None:
        with History.open(self.history.path, write=False) as reader:
            assert len(reader) == len(self.numbers)
            for round, number in enumerate(self.numbers):
                assert reader.find(f"task-{number}") == round
                try:
                    assert reader.payload(round) == payload_of(number)
                except RoundDiscarded:
                    assert round in self.removed
            for source in ("even", "odd"):
                assert reader.cursor(source) == self.cursors.get(source)

    def teardown(self) -> None:
        self.history.close()
        shutil.rmtree(self.folder)


TestHistoryWithModel = HistoryWithModel.TestCase
# Not shrunk: each attempt is a history on disk, and shrinking would take minutes. Twenty steps are readable as
# they are, and `--hypothesis-seed` or the example database reproduces them.
TestHistoryWithModel.settings = settings(
    max_examples=60,
    stateful_step_count=20,
    deadline=None,
    phases=set(Phase) - {Phase.shrink, Phase.explain},
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow],
)
