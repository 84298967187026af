"""What the bodies of requests under way hold together is bounded."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import zstandard

from deploy.server import limits
from deploy.server.limits import BodyBudget, BudgetExhausted, read_body
from streams.spec import Limits


class Sent:
    """Stands for a request whose body comes in pieces."""

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


def read(body_budget: BodyBudget, sent: Sent) -> bytes:
    with body_budget.reserve() as reservation:
        return asyncio.run(read_body(sent, reservation))


def test_bodies_beyond_the_memory_there_is_are_put_off_and_their_room_is_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "BUDGET_BYTES", 100)
    body_budget = BodyBudget(Limits(body_bytes=30))
    with body_budget.reserve() as first, body_budget.reserve() as second:
        for reservation in (first, second):
            for _ in range(2):
                assert asyncio.run(read_body(Sent(bytes(20), bytes(10)), reservation)) == bytes(30)
                reservation.received.clear()
        assert (first.reserved_bytes, second.reserved_bytes) == (60, 60)
        with pytest.raises(BudgetExhausted):
            read(body_budget, Sent(b"x"))
    for _ in range(20):
        assert read(body_budget, Sent(bytes(15), bytes(15))) == bytes(30)


def test_what_a_body_unpacks_to_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BUDGET_BYTES", 100)
    body_budget = BodyBudget(Limits(body_bytes=1000))
    packed = zstandard.compress(bytes(900))
    body_budget.take(3200 - 100)
    with pytest.raises(BudgetExhausted):
        read(body_budget, Sent(packed, encoding="zstd"))
    assert read(BodyBudget(Limits(body_bytes=1000)), Sent(packed, encoding="zstd")) == bytes(900)
    body_budget.take(-2000)
    assert read(body_budget, Sent(packed, encoding="zstd")) == bytes(900)
