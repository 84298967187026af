"""The client against a real daemon."""

import asyncio

import pytest
import torch

from streams.client import AsyncClient, Client, DaemonError
from tests.support.daemon import Daemon, decode, sinusoid, wait_for


def tensors(t: int) -> dict[str, torch.Tensor]:
    task = decode(sinusoid(t))
    return {
        "support_x": task.support.x,
        "support_y": task.support.y,
        "query_x": task.query.x,
        "query_y": task.query.y,
    }


def test_the_client_submits_adapts_and_reads(daemon: Daemon) -> None:
    with Client(daemon.url) as client:
        first = client.submit(tensors(3000), id="by-client")
        assert client.submit(tensors(3000), id="by-client") == (first.id, first.round, True)
        in_lists = {name: values.tolist() for name, values in tensors(3001).items()}
        assert client.submit(in_lists).duplicate is False
        assert client.submit(tensors(3001)).duplicate, "the same numbers give the same body, and so the same id"
        assert client.submit(tensors(3002), id="as-tensors", safetensors=True).duplicate is False
        daemon.wait_until_learned(daemon.status()["rounds"]["ingested"])
        assert client.task("by-client").status == "learned"
        request = {name: values for name, values in tensors(3003).items() if name != "query_y"}
        newest = daemon.status()["rounds"]["learned"]
        wait_for("the newest leader answers", lambda: client.adapt(request).round == newest)
        found = client.adapt(request)
        assert torch.tensor(found.predictions).shape == (5, 1)
        assert client.adapt(request, safetensors=True) == found
        assert client.status()["rounds"]["ingested"] > first.round
        assert client.verdict().state == "too_early"
        assert client.regret(to=2)["rounds"] == [0, 1]
        with pytest.raises(DaemonError, match="fixed_samples \\(HTTP 422\\): ftml cannot answer with 3 samples"):
            client.adapt(request, samples=3)
        with pytest.raises(DaemonError, match="wrong_shape \\(HTTP 422\\): support_x has shape"):
            client.submit({"support_x": [[1, 2]], "support_y": [[1]]})


def test_coroutines_submit_at_the_same_time(daemon: Daemon) -> None:
    async def submit() -> list[int]:
        async with AsyncClient(daemon.url) as client:
            sent = (client.submit(tensors(3100 + t), id=f"async-{t}") for t in range(8))
            return [receipt.round for receipt in await asyncio.gather(*sent)]

    assert len(set(asyncio.run(submit()))) == 8
