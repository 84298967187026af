"""The memory that all request bodies in progress hold is bounded."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import zstandard

from deploy.server import limits
from deploy.server.limits import BodyBudget, BudgetExhausted, read_body
from streams.spec import Limits


class FakeRequest:
    """A request whose body comes in pieces."""

    def __init__(self, *pieces: bytes, encoding: str = "") -> None:
        self.pieces, self.headers = pieces, self
        self.encoding = encoding

    def get(self, name: str, default: str) -> str:
        return default

    def getlist(self, name: str) -> list[str]:
        return [self.encoding] if self.encoding else []

    async def stream(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            yield piece


def read(body_budget: BodyBudget, sent: FakeRequest) -> bytes:
    with body_budget.reserve() as reservation:
        return asyncio.run(read_body(sent, reservation))


def test_bodies_beyond_the_budget_are_refused_and_memory_is_released(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "BUDGET_BYTES", 100)
    body_budget = BodyBudget(Limits(body_bytes=30))
    with body_budget.reserve() as first, body_budget.reserve() as second:
        for reservation in (first, second):
            for _ in range(2):
                assert asyncio.run(read_body(FakeRequest(bytes(20), bytes(10)), reservation)) == bytes(30)
                reservation.received.clear()
        assert (first.reserved_bytes, second.reserved_bytes) == (60, 60)
        with pytest.raises(BudgetExhausted):
            read(body_budget, FakeRequest(b"x"))
    for _ in range(20):
        assert read(body_budget, FakeRequest(bytes(15), bytes(15))) == bytes(30)


def test_the_decompressed_size_of_a_body_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BUDGET_BYTES", 100)
    body_budget = BodyBudget(Limits(body_bytes=1000))
    packed = zstandard.compress(bytes(900))
    body_budget.take(3200 - 100)
    with pytest.raises(BudgetExhausted):
        read(body_budget, FakeRequest(packed, encoding="zstd"))
    assert read(BodyBudget(Limits(body_bytes=1000)), FakeRequest(packed, encoding="zstd")) == bytes(900)
    body_budget.take(-2000)
    assert read(body_budget, FakeRequest(packed, encoding="zstd")) == bytes(900)
