"""Answers from other threads all reach the event loop."""

import asyncio
import threading
from concurrent.futures import Future

import pytest

from deploy.server.app import FutureBridge


def test_every_answer_arrives_from_any_thread() -> None:
    futures: list[Future[int]] = [Future() for _ in range(2000)]

    async def wait() -> list[int]:
        answers = FutureBridge()
        waiting = [asyncio.ensure_future(answers.wait_for(future)) for future in futures]
        await asyncio.sleep(0)

        def answer(of: int) -> None:
            for n in range(of, len(futures), 4):
                futures[n].set_result(n)

        threads = [threading.Thread(target=answer, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        found = await asyncio.wait_for(asyncio.gather(*waiting), 60)
        for thread in threads:
            thread.join()
        return found

    assert asyncio.run(wait()) == list(range(2000))


def test_a_batch_wakes_the_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def wait() -> tuple[list[int], int]:
        loop, answers, woken = asyncio.get_running_loop(), FutureBridge(), []
        futures: list[Future[int]] = [Future() for _ in range(8)]
        waiting = [asyncio.ensure_future(answers.wait_for(future)) for future in futures]
        await asyncio.sleep(0)
        wake = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda call: (woken.append(call), wake(call)))
        for n, future in enumerate(futures):
            future.set_result(n)
        found = [await one for one in waiting]
        monkeypatch.undo()
        return found, len(woken)

    assert asyncio.run(wait()) == (list(range(8)), 1)


def test_errors_arrive_and_cancelled_futures_are_skipped() -> None:
    async def wait() -> None:
        answers, failed, lost, done = FutureBridge(), Future[int](), Future[int](), Future[int]()
        waiting = asyncio.ensure_future(answers.wait_for(lost))
        await asyncio.sleep(0)
        waiting.cancel()
        lost.set_result(1)
        failed.set_exception(OSError("full"))
        done.set_result(2)
        with pytest.raises(OSError, match="full"):
            await answers.wait_for(failed)
        assert await answers.wait_for(done) == 2

    asyncio.run(wait())
