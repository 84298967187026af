"""Rounds are subsampled fairly, each decision is recorded in the history, and the space is released."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.history import ledger
from streams.history.errors import RoundDiscarded
from streams.history.history import History
from streams.history.maintenance import Maintenance
from streams.history.retention import (
    DAY_SECONDS,
    Candidates,
    RetainedRounds,
    RetentionSettings,
    compact,
    count_discarded,
    hash_priorities,
    last_decision,
    retained_rounds,
    select_retained,
    stratified_priorities,
    subsample,
)
from streams.history.sealing import SealingSettings, evict_payloads, remove_orphans, seal_next
from streams.history.verify import verify
from streams.types import Record
from tests.streams.archive.test_sealing import in_ledger, padded
from tests.support.daemon import wait_for

Make = Callable[..., Record]
DAY = 86_400.0
OVER_TIME: dict[str, Any] = {"thin": "stratified", "strata": ("time",)}
TEN = RetentionSettings(rounds=10)
FIVE = SealingSettings(segment_rounds=5)


def candidates(count: int, sources: str = "s", size: int = 1) -> Candidates:
    rounds = np.arange(count, dtype=np.int64)
    names = np.array([sources[round % len(sources)] for round in range(count)])
    return Candidates(rounds, names, rounds * DAY, np.full(count, size, np.int64))


@pytest.mark.parametrize("thinned", [{}, OVER_TIME], ids=["reservoir", "time"])
def test_each_round_is_kept_with_the_same_probability(thinned: dict[str, Any]) -> None:
    """The probability does not depend on the round number: old and new, early and late."""
    kept = np.zeros(200)
    for shift in range(0, 200_000, 200):
        some = candidates(200)._replace(rounds=np.arange(shift, shift + 200, dtype=np.int64))
        kept += select_retained(some, RetentionSettings(rounds=50, **thinned))
    chi_square = ((kept - 250) ** 2 / (250 * 0.75)).sum()
    assert 120 < chi_square < 300, "199 degrees of freedom: 4 sigma are 80"
    assert abs(np.corrcoef(kept, np.arange(200))[0, 1]) < 0.3


@pytest.mark.parametrize("rank", [hash_priorities, stratified_priorities])
def test_the_hash_is_injective_and_uniform(rank: Callable[..., Any]) -> None:
    found = rank(np.arange(100_000, dtype=np.int64))
    assert len(np.unique(found)) == 100_000
    counts = np.histogram(found.astype(np.float64), bins=100, range=(0, 2.0**64))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 160


@given(
    st.integers(1, 60),
    st.integers(1, 20),
    st.lists(st.integers(1, 30), min_size=1, max_size=6),
    st.sampled_from([{}, OVER_TIME, {"thin": "stratified"}]),
)
def test_repeated_subsampling_equals_subsampling_once(
    first: int, most: int, more: list[int], thinned: dict[str, Any]
) -> None:
    """Subsampling a sample again gives the sample of all rounds, so it stays fair."""
    settings = RetentionSettings(rounds=most, **thinned)
    held, count = np.arange(0), 0
    for step in [first, *more]:
        rounds = np.concatenate([held, np.arange(count, count + step)]).astype(np.int64)
        names = np.array(["ab"[round % 2] for round in rounds])
        some = Candidates(rounds, names, rounds * 1.0, np.ones(len(rounds), np.int64))
        held, count = rounds[select_retained(some, settings)], count + step
    assert held.tolist() == np.flatnonzero(select_retained(candidates(count, "ab"), settings)).tolist()
    assert len(held) == min(most, count)


@given(st.integers(0, 2**40), st.integers(0, 12))
def test_every_block_has_one_first_round(block: int, height: int) -> None:
    rounds = (block << height) + np.arange(1 << height, dtype=np.int64)
    assert (stratified_priorities(rounds) < np.uint64((1 << (64 - height)) - 1)).sum() == 1


def test_the_first_round_of_a_block_is_random() -> None:
    """Each round of a block is equally likely, whichever is first in the next block: streams are often periodic."""
    firsts = stratified_priorities(np.arange(16 * 4000, dtype=np.int64)).reshape(-1, 16).argmin(axis=1)
    counts = np.bincount(firsts, minlength=16)
    assert ((counts - 250) ** 2 / 250).sum() < 45, "15 degrees of freedom: the 1e-4 quantile is 44"
    pairs = np.bincount(firsts[::2] * 16 + firsts[1::2], minlength=256)
    assert ((pairs - 2000 / 256) ** 2 / (2000 / 256)).sum() < 350, "255 degrees of freedom: 4 sigma are 90"


@pytest.mark.parametrize("count", [1000, 1024, 1500, 4000, 100_000])
def test_early_and_late_rounds_stay_equally_represented(count: int) -> None:
    some = candidates(count, "ab")
    most = 100
    kept = np.flatnonzero(select_retained(some, RetentionSettings(rounds=most, **OVER_TIME)))
    length = 1 << int(np.ceil(np.log2(count / most))) + 1
    whole = np.bincount(kept // length)[: count // length]
    assert whole.min() >= 1, "every block keeps a round"
    assert whole.max() <= 4
    tenths = np.histogram(kept, bins=10, range=(0, count))[0]
    assert tenths.min() >= 6
    assert tenths.max() <= 14
    assert 30 <= (kept % 2).sum() <= 70, "rounds with period two are not left out"


def test_a_late_source_is_kept_and_spread_over_its_time() -> None:
    some = candidates(4000)
    sources = np.where(some.rounds < 3000, "old", "new")
    settings = RetentionSettings(rounds=100, thin="stratified")
    kept = some.rounds[select_retained(some._replace(sources=sources), settings)]
    assert (kept >= 3000).sum() == 50
    for first, last in ((0, 3000), (3000, 4000)):
        assert np.histogram(kept, bins=5, range=(first, last))[0].min() >= 6


def test_the_kept_bytes_are_bounded() -> None:
    some = candidates(100)._replace(bytes=np.arange(1, 101, dtype=np.int64))
    kept = select_retained(some, RetentionSettings(bytes=2_000))
    assert 1_800 < some.bytes[kept].sum() <= 2_000


def test_rounds_that_are_too_old_are_discarded() -> None:
    assert np.flatnonzero(select_retained(candidates(50), RetentionSettings(age_days=9.5))).tolist() == list(
        range(40, 50)
    )
    both = np.flatnonzero(select_retained(candidates(50), RetentionSettings(age_days=9.5, rounds=4)))
    assert len(both) == 4
    assert min(both) >= 40


def test_a_clock_that_was_once_ahead_makes_no_round_old() -> None:
    some = candidates(50)
    now = float(some.arrived.max())
    some.arrived[20] = now + 365 * DAY_SECONDS
    kept = np.flatnonzero(select_retained(some, RetentionSettings(age_days=9.5), now))
    assert kept.tolist() == [20, *range(40, 50)]


def test_strata_are_kept_equally_however_rare_they_are() -> None:
    rare = candidates(300, "a" * 28 + "bc")
    kept = rare.sources[select_retained(rare, RetentionSettings(rounds=60, thin="stratified"))]
    assert {source: (kept == source).sum() for source in "abc"} == {"a": 40, "b": 10, "c": 10}
    kept = rare.sources[select_retained(rare, RetentionSettings(rounds=15, thin="stratified"))]
    assert {source: (kept == source).sum() for source in "abc"} == {"a": 5, "b": 5, "c": 5}
    kept = rare.sources[select_retained(rare, RetentionSettings(rounds=60))]
    assert (kept == "a").sum() > 45


def test_retained_rounds_are_a_sequence() -> None:
    kept = RetainedRounds(np.array([2, 5]), 7, 10)
    assert list(kept) == [2, 5, 7, 8, 9]
    assert (len(kept), kept[-1], kept[1:4], 7 in kept, 6 in kept) == (5, 9, [5, 7, 8], True, False)
    for outside in (5, -6):
        with pytest.raises(IndexError, match="is out of range: 5 rounds are retained"):
            kept[outside]


def kept_after(history: History, count: int) -> list[int]:
    decided = last_decision(history.query, count)
    return list(RetainedRounds(retained_rounds(history.query, decided), decided, count))


def test_a_decision_applies_to_later_rounds(history: History, make_record: Make) -> None:
    history.append([make_record(n) for n in range(30)])
    assert subsample(history, TEN) == 20
    first = kept_after(history, 31)
    assert kept_after(history, 30) == list(range(30)), "round 29 came before the decision"
    assert len(first) == 11
    assert first[-1] == 30
    history.append([make_record(n) for n in range(30, 60)])
    assert subsample(history, TEN) == 30
    assert kept_after(history, 31) == first, "a replay of round 30 sees the same rounds"
    assert kept_after(history, 60)[:10] == first[:10]
    assert kept_after(history, 60)[10:] == list(range(30, 60))
    assert len(kept_after(history, 61)) == 11
    assert kept_after(history, 61)[:-1] == np.flatnonzero(select_retained(candidates(60), TEN)).tolist()
    assert subsample(history, TEN) == 0
    assert verify(history.path).clean


def test_rounds_that_no_checkpoint_needs_are_removed(history: History, make_record: Make) -> None:
    history.append([make_record(n) for n in range(30)])
    while seal_next(history, FIVE):
        pass
    evict_payloads(history, 0)
    history.append([make_record(n) for n in range(30, 33)])
    subsample(history, TEN)
    kept = kept_after(history, 34)[:-1]
    assert compact(history, 32, 5) == 0, "a checkpoint is older than the decision"
    assert [history.payload(n) for n in range(33)] == [make_record(n).payload for n in range(33)]
    assert count_discarded(history.query) == 0
    assert compact(history, 33, 5) == 23
    assert compact(history, 33, 5) == 0
    assert count_discarded(history.query) == 23
    for round in range(33):
        if round in kept:
            assert history.payload(round) == make_record(round).payload
    archived = set().union(*(history.archive.segment(name).rounds.tolist() for name in history.archive.names()))
    for round in set(range(33)).difference(kept, archived):
        with pytest.raises(RoundDiscarded, match=f"round {round} is gone: retention has discarded it"):
            history.payload(round)
    assert verify(history.path).clean
    assert remove_orphans(history) == []
    assert len(history.archive.names()) <= 3, "the rest of six segments is merged"
    assert history.append([make_record(3)])[0].duplicate, "an id is never forgotten"
    assert history.append([make_record(33)])[0].round == 33


def test_the_space_is_released(history: History, make_record: Make) -> None:
    for first in range(0, 200, 20):
        history.append([padded(make_record(n), n) for n in range(first, first + 20)])
    subsample(history, TEN)
    compact(history, 200, 5)
    with history.borrow_writer() as writer:
        writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    assert (history.path / ledger.FILE).stat().st_size < 2_000_000
    assert len(in_ledger(history)) == 10
    assert verify(history.path).clean


@pytest.mark.parametrize("at", range(4))
def test_a_killed_compaction_is_resumed(
    history: History, make_record: Make, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    history.append([make_record(n) for n in range(30)])
    while seal_next(history, FIVE):
        pass
    evict_payloads(history, 0)
    subsample(history, TEN)

    class Killed(BaseException):
        pass

    def die(*_: object, **__: object) -> None:
        raise Killed

    places = [
        ("streams.history.archive_index.drop_payloads", die),
        ("streams.history.archive.archive.Archive.publish", die),
        ("streams.history.archive_index.record_segments", die),
        ("streams.history.archive.archive.Archive.discard", die),
    ]
    with monkeypatch.context() as patched:
        patched.setattr(*places[at])
        with pytest.raises(Killed):
            compact(history, 30, 5)
    assert verify(history.path).clean
    assert remove_orphans(history) == []
    compact(history, 30, 5)
    kept = kept_after(history, 31)[:-1]
    assert [history.payload(n) for n in kept] == [make_record(n).payload for n in kept]
    assert count_discarded(history.query) == 20
    assert verify(history.path).clean


def test_maintenance_subsamples_and_compacts_by_itself(tmp_path: Path, make_record: Make) -> None:
    learned = 0
    with History.open(tmp_path, write=True) as history:
        maintenance = Maintenance(history, SealingSettings(segment_rounds=5, ledger_bytes=0), TEN, lambda: learned)
        for n in range(80):
            history.append([make_record(n)])
            learned = max(0, n - 3)
        learned = 80
        wait_for("most rounds are discarded", lambda: count_discarded(history.query) >= 65)
        maintenance.close()
        assert 80 - count_discarded(history.query) <= 15
        kept = kept_after(history, 81)
        assert [history.payload(n) for n in kept[:-1]] == [make_record(n).payload for n in kept[:-1]]
    assert verify(tmp_path).clean
