"""A process of its own answers once there are more than a few requests, and its answers are those of the daemon."""

import contextlib
import json
import math
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from safetensors.torch import load

from deploy.config.config import read_config
from deploy.leader import Adapter
from deploy.predictions import AnswerFormat
from deploy.processes import answers
from deploy.processes.answers import (
    ANSWER_JSON,
    ANSWER_TENSORS,
    GIVEN,
    NOT_READY,
    REHEARSE,
    REJECTED,
    SERVE,
    AnsweringLoop,
    Frame,
    describe_served,
    open_served,
    pack_frame,
    unpack_frames,
)
from deploy.server.answering import START_AFTER
from online_meta.functional.recording import Recorder
from streams.formats.json_body import tensors_to_json
from streams.sources.sinusoid import make_task
from streams.types import Rejected
from tests.support.daemon import Daemon, encode, running_daemon, wait_for, write_sinusoid
from trainers import build
from trainers.journal.leader_file import encode_leader

TASK = make_task(0, 1000, 5, 5)
BODY = encode({"support_x": TASK.support.x, "support_y": TASK.support.y, "query_x": TASK.query.x})
JSON_BODY = json.dumps({name: value.tolist() for name, value in load(BODY).items()}).encode()
SENT = {
    "tensors": ("", BODY, {}),
    "JSON": ("", JSON_BODY, {"Content-Type": "application/json"}),
    "tensors, answered in JSON": ("", BODY, {"Accept": "application/json"}),
    "the mean as well": ("?part=mean", BODY, {"Accept": "application/json"}),
    "five samples": ("?samples=5", BODY, {}),
    "no tensors": ("", b"x", {}),
    "a wrong shape": ("", encode({**load(BODY), "query_x": TASK.query.x[:, 0]}), {}),
    "no query": ("", encode({"support_x": TASK.support.x, "support_y": TASK.support.y}), {}),
    "an empty list": ("", b'{"support_x": []}', {"Content-Type": "application/json"}),
    "a spread that a squared error does not have": ("?part=std&level=0.9", BODY, {}),
    "too many samples": ("?samples=101", BODY, {}),
}
STATUSES = [200] * 5 + [422] * 6


def ask_everything(daemon: Daemon) -> dict[str, tuple[int, bytes, str | None, str]]:
    """Return the status, the body, the round and the type of the answer to each of ``SENT``."""
    found = {}
    for name, (query, body, headers) in SENT.items():
        answer = daemon.client.post(f"/v1/adapt{query}", content=body, headers=headers)
        media_type = answer.headers["Content-Type"]
        found[name] = (answer.status_code, answer.content, answer.headers.get("X-Online-Meta-Round"), media_type)
    return found


def find_process(daemon: Daemon) -> psutil.Process | None:
    for child in psutil.Process(daemon.process.pid).children():
        with contextlib.suppress(psutil.Error):  # It may have just ended.
            if "deploy.processes.answers" in child.cmdline():
                return child
    return None


def ask_until(daemon: Daemon, true: Callable[[], bool]) -> None:
    def look() -> bool:
        assert daemon.client.post("/v1/adapt", content=BODY).status_code == 200
        return true()

    wait_for("the process answers", look)


def wait_until_connected(daemon: Daemon) -> psutil.Process:
    """Return the process once it has opened the run: it then waits for requests in its socket, without computing."""
    ask_until(daemon, lambda: find_process(daemon) is not None)
    process = find_process(daemon)
    assert process is not None
    wait_for("it has read the leader", lambda: process.num_threads() >= answers.THREADS and _answers(daemon, process))
    return process


def _answers(daemon: Daemon, process: psutil.Process) -> bool:
    """Return whether the process, and no thread of the daemon, answers."""
    process.suspend()
    try:
        httpx.post(f"{daemon.url}/v1/adapt", content=BODY, headers=dict(daemon.client.headers), timeout=2)
    except httpx.TimeoutException:
        return True
    finally:
        process.resume()
    return False


def wait_until_published(daemon: Daemon, round: int) -> None:
    def look() -> bool:
        return daemon.client.get("/v1/weights").headers.get("X-Online-Meta-Round") == str(round)

    wait_for(f"the leader after {round} rounds is published", look)


ALONE = ("pool.aggregation=none", "regret.baselines=[]", "regret.comparator=[]", "inner.answer_steps=[]")
"""One learner plays: a process records its answers in a second, and those of the pool in many."""
ABML = ("inner.rule=bayes_by_gradient", "inner.posterior=samples")
BELIEFS = {"samples": ABML, "laplace": ("inner.posterior=laplace",)}
FIXED = {
    "point": (),
    "particles": ("inner.rule=svgd", "inner.options={particles=3}", "inner.posterior=particles", "inner.samples=3"),
}
NATS = ("model.loss=gaussian_of_noise", "inner.samples=2")


def test_a_process_answers_as_the_daemon_does_and_survives_its_end(tmp_path: Path) -> None:
    with running_daemon(write_sinusoid(tmp_path), *ALONE, *ABML) as daemon:
        daemon.submit(*range(4))
        wait_until_published(daemon, 4)
        own = ask_everything(daemon)
        assert [status for status, *_ in own.values()] == STATUSES
        found = json.loads(own["the mean as well"][1])
        assert found["mean"] == found["predictions"]
        assert load(own["five samples"][1])["component.0.outputs"].shape == (5, 5, 1)
        assert json.loads(own["too many samples"][1])["reason"] == "bad_parameter"
        assert json.loads(own["a spread that a squared error does not have"][1])["reason"] == "no_distribution"
        for _ in range(START_AFTER - len(SENT)):
            assert daemon.client.post("/v1/adapt", content=BODY).status_code == 200
        assert find_process(daemon) is None, "few requests start no process"
        first = wait_until_connected(daemon)
        assert ask_everything(daemon) == own
        daemon.submit(4)
        wait_until_published(daemon, 5)
        after = ask_everything(daemon)["tensors"]
        assert after[2] == "5"
        assert after[1] != own["tensors"][1]
        first.kill()
        ask_until(daemon, lambda: (found := find_process(daemon)) is not None and found.pid != first.pid)
        wait_until_connected(daemon)
        assert daemon.drain() == 0
        assert "Traceback" not in daemon.log.read_text()


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[socket.socket]:
    """The daemon's end of a connection to a loop in a thread."""
    own, other = socket.socketpair()
    thread = threading.Thread(target=AnsweringLoop(other).run, daemon=True)
    thread.start()
    with own:
        own.settimeout(200)
        yield own
    thread.join(200)
    assert not thread.is_alive(), "the loop ends with its connection"
    other.close()


def receive(channel: socket.socket, count: int) -> dict[int, Frame]:
    """Return the next frames by number."""
    received, found = bytearray(), dict[int, Frame]()
    while len(found) < count:
        received += channel.recv(1000)
        found |= {frame.number: frame for frame in unpack_frames(received)}
    return found


def test_each_request_gets_its_own_answer(loop: socket.socket, tmp_path: Path) -> None:
    config, leader = read_config(write_sinusoid(tmp_path)), tmp_path / "leader.safetensors"
    adapter = Adapter(config.trainer(), leader)
    description = describe_served(config, leader)
    frames = [Frame(0, SERVE, 0, description), Frame(1, ANSWER_TENSORS, 0, BODY), Frame(2, ANSWER_TENSORS, 0, b"x")]
    sent = b"".join(map(pack_frame, frames))
    for at in range(0, len(sent), 100):
        loop.sendall(sent[at : at + 100])
    found = receive(loop, 3)
    assert [found[number].kind for number in range(3)] == [GIVEN, NOT_READY, REJECTED]
    assert json.loads(found[2].body)["reason"] == "unreadable"
    name, state = adapter.answering.name, adapter.answering.learner.state()
    leader.write_bytes(encode_leader(state, 3, learner=name))
    loop.sendall(pack_frame(Frame(7, ANSWER_TENSORS, 0, BODY)) + pack_frame(Frame(8, ANSWER_JSON, 0, JSON_BODY)))
    found = receive(loop, 2)
    right, _ = adapter.answer(TASK.support, TASK.query.x)
    assert found[7] == Frame(7, GIVEN, 3, right)
    assert json.loads(found[8].body) == {"round": 3, **tensors_to_json(right)}


def publish(adapter: Adapter, leader: Path) -> None:
    leader.write_bytes(encode_leader(adapter.answering.learner.state(), 3, learner=adapter.answering.name))


def test_after_a_rehearsal_a_program_answers(
    loop: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "SLOW_ANSWER", math.inf)
    monkeypatch.setattr(answers, "REHEARSAL_SECONDS", math.inf)
    config, leader = read_config(write_sinusoid(tmp_path)), tmp_path / "leader.safetensors"
    adapter, called = Adapter(config.trainer(), leader), []
    publish(adapter, leader)
    right, _ = adapter.answer(TASK.support, TASK.query.x)
    original = Recorder._call_and_count

    def count(self: Any, *args: Any) -> Any:
        called.append(1)
        return original(self, *args)

    monkeypatch.setattr(Recorder, "_call_and_count", count)
    for number, (kind, body) in enumerate(
        ((SERVE, describe_served(config, leader)), (REHEARSE, b"x"), (REHEARSE, BODY))
    ):
        loop.sendall(pack_frame(Frame(number, kind, 0, body)))
    assert {frame.kind for frame in receive(loop, 3).values()} == {GIVEN}
    rehearsed = len(called)
    assert rehearsed
    for number in range(3):
        loop.sendall(pack_frame(Frame(number, ANSWER_TENSORS, 0, BODY)))
    assert {frame.body for frame in receive(loop, 3).values()} == {right}
    assert len(called) == rehearsed


@pytest.mark.parametrize("name", BELIEFS)
def test_a_request_sets_the_number_of_samples(name: str, tmp_path: Path) -> None:
    """The first of them are those of a smaller number, and both processes draw the same ones."""
    config, leader = read_config(write_sinusoid(tmp_path), (*ALONE, *BELIEFS[name], *NATS)), tmp_path / "leader"
    adapter, found = Adapter(config.trainer(), leader), {}
    publish(adapter, leader)
    with ThreadPoolExecutor(1) as executor:
        served = open_served(describe_served(config, leader), executor)
        served.rehearse(BODY, executor)
        for samples in (None, 1, 5):
            format = AnswerFormat(samples=samples)
            own = adapter.answer(TASK.support, TASK.query.x, format)
            assert served.answer(BODY, format) == own == adapter.answer(TASK.support, TASK.query.x, format)
            found[samples] = load(own[0])
    outputs = found[5]["component.0.outputs"]
    assert outputs.shape == (5, 5, 1)
    assert len({tuple(one.flatten().tolist()) for one in outputs}) == 5
    assert torch.equal(found[None]["component.0.outputs"], outputs[:2])
    assert torch.equal(found[5]["component.0.log_weights"], torch.log_softmax(torch.zeros(5), 0))
    assert "component.0.outputs" not in found[1]


@pytest.mark.parametrize("sets", FIXED.values(), ids=FIXED)
def test_a_number_of_samples_is_refused_where_nothing_is_drawn(sets: tuple[str, ...], tmp_path: Path) -> None:
    config, leader = read_config(write_sinusoid(tmp_path), (*ALONE, *sets)), tmp_path / "leader"
    adapter = Adapter(config.trainer(), leader)
    publish(adapter, leader)
    with pytest.raises(
        Rejected, match=r"fixed_samples: ftml cannot answer with 4 samples: .* with posterior = 'samples'"
    ):
        adapter.answer(TASK.support, TASK.query.x, AnswerFormat(samples=4))


def test_in_a_pool_the_experts_that_draw_have_the_number_of_samples(tmp_path: Path) -> None:
    sets = (*ABML, *NATS, "inner.answer_steps=[]")
    config, leader = read_config(write_sinusoid(tmp_path), sets), tmp_path / "leader"
    adapter = Adapter(config.trainer(), leader)
    publish(adapter, leader)
    for samples, right in ((None, 2 + 1), (4, 4 + 1)):
        prediction, *_ = adapter.predict(TASK.support, TASK.query.x, samples)
        assert sum(len(part.log_weights) for part in prediction) == right, "FTML's, and that of from_scratch"
        assert sum(float(part.log_weights.exp().sum()) for part in prediction) == pytest.approx(1.0)


def test_slow_answers_do_not_wait_for_each_other(
    loop: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, together = read_config(write_sinusoid(tmp_path)), threading.Barrier(answers.THREADS)

    def wait_for_another(self: Adapter, *args: object) -> tuple[bytes, int]:
        together.wait(200)
        return b"", 0

    monkeypatch.setattr(Adapter, "answer", wait_for_another)
    monkeypatch.setattr(answers, "QUICK_SECONDS", 0.0)
    loop.sendall(pack_frame(Frame(0, SERVE, 0, describe_served(config, tmp_path / "leader"))))
    for number in range(1, 5):
        loop.sendall(pack_frame(Frame(number, ANSWER_TENSORS, 0, BODY)))
    assert {frame.kind for frame in receive(loop, 5).values()} == {GIVEN}


def test_a_branch_is_described_whole(tmp_path: Path) -> None:
    limits = "limits = { json_bytes = 1000 }\n"
    config = read_config(write_sinusoid(tmp_path, limits), ("task.y_shape=[1]", "inner.answer_steps=[3]"))
    served = open_served(describe_served(config, tmp_path / "leader"), ThreadPoolExecutor(1))
    assert (served.task, served.limits) == (config.task, config.serve.limits)
    assert served.adapter.answering.name == Adapter(config.trainer(), tmp_path / "leader").answering.name
