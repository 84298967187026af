"""The process that answers: ``python -m deploy.processes.answers LOGS``, with the daemon's socket as standard input."""

import gc
import json
import logging
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, Thread
from typing import NamedTuple

from pydantic import TypeAdapter

from deploy.config.config import Config, parse_settings
from deploy.exits import DONE, TRY_LATER
from deploy.leader import Adapter
from deploy.logs import Origin, log_to_stderr
from deploy.predictions import PLAIN, AnswerFormat
from deploy.processes.child import die_with_parent
from online_meta.functional.recording import COMPARED_CALLS, RECORD_AFTER_CALLS
from online_meta.types import Batch, Tensors
from streams.formats import wire
from streams.formats.json_body import read_as_safetensors, tensors_to_json
from streams.spec import Limits, TaskSpec
from streams.types import Rejected
from trainers.settings import TrainerSettings

THREADS = 2
"""Requests that are answered at the same time, if answers are slow."""
QUICK_SECONDS = 0.02
"""Answers that take less processor time are given one after another: two threads of Python slow each other down."""
REHEARSAL_SECONDS = 10.0
"""Processor time after which a rehearsal repeats an answer no more; slower answers gain little from a record."""
RECEIVE_BYTES = 256 * 1024
SERVE, ANSWER_TENSORS, ANSWER_JSON, REHEARSE, ANSWER_FORMAT = 0, 1, 2, 3, 4
"""What a frame to the process asks for: to serve a branch of the run, an answer, or to record answers.

The body of ``ANSWER_FORMAT`` begins with the format of the answer; see ``pack_request``.
"""
GIVEN, REJECTED, NOT_READY = 0, 1, 2
"""What a frame from the process has: what was asked for, or a reason why not."""
log = logging.getLogger(__name__)


class Frame(NamedTuple):
    """A message between the daemon and the process.

    Attributes:
        number: of the request, which its answer has, too.
        kind: what the frame asks for or has.
        round: the number of rounds that the leader of an answer has learned.
        body: of the request or the answer.
    """

    number: int
    kind: int
    round: int
    body: bytes


_HEAD, _LENGTH = struct.Struct("<QQQB"), struct.Struct("<I")


def pack_frame(frame: Frame) -> bytes:
    """Return the bytes of a frame."""
    return _HEAD.pack(len(frame.body), frame.number, frame.round, frame.kind) + frame.body


def unpack_frames(received: bytearray) -> Iterator[Frame]:
    """Yield the complete frames at the beginning of what was received, and remove them."""
    while len(received) >= _HEAD.size:
        length, number, round, kind = _HEAD.unpack_from(received)
        end = _HEAD.size + length
        if len(received) < end:
            return
        body = bytes(memoryview(received)[_HEAD.size : end])
        del received[:end]
        yield Frame(number, kind, round, body)


@dataclass(frozen=True)
class Served:
    """A branch of a run whose requests are answered: its learner, and what its requests may be."""

    adapter: Adapter
    task: TaskSpec
    limits: Limits

    def answer(self, body: bytes, format: AnswerFormat) -> tuple[bytes, int]:
        """Return the answer to the body of a request in a format, and the rounds that it is based on.

        Raises as ``decode_request`` and ``answer_as`` do.
        """
        return answer_as(self.adapter, *decode_request(self.task, self.limits, body), format)

    def rehearse(self, body: bytes, executor: Executor) -> None:
        """Answer to a request so often that answers to requests of its shapes are recorded by ``executor`` afterwards.

        Does nothing with a body that is refused, or before a leader is published.
        """
        deadline = time.thread_time() + REHEARSAL_SECONDS
        try:
            for count in (RECORD_AFTER_CALLS, COMPARED_CALLS):
                for _ in range(count):
                    if time.thread_time() < deadline:
                        self.answer(body, PLAIN)
                executor.submit(gc.collect).result()  # It has one thread, which has recorded when it comes to this.
        except (Rejected, FileNotFoundError) as error:
            log.debug("not rehearsed: %s", error)


def pack_request(format: AnswerFormat, body: bytes) -> tuple[int, bytes]:
    """Return the kind and the body of the frame that asks for an answer to the ``body`` of a request."""
    if format == AnswerFormat(format.as_json):
        return ANSWER_JSON if format.as_json else ANSWER_TENSORS, body
    head = json.dumps(format).encode()
    return ANSWER_FORMAT, _LENGTH.pack(len(head)) + head + body


def unpack_request(frame: Frame) -> tuple[AnswerFormat, bytes]:
    """Return the format of the answer that a frame asks for, and the body of the request."""
    if frame.kind != ANSWER_FORMAT:
        return AnswerFormat(as_json=frame.kind == ANSWER_JSON), frame.body
    begin = _LENGTH.size
    end = begin + _LENGTH.unpack_from(frame.body)[0]
    as_json, parts, levels, samples = json.loads(frame.body[begin:end])
    return AnswerFormat(as_json, tuple(parts), tuple(levels), samples), frame.body[end:]


def answer_as(adapter: Adapter, support: Batch, query_x: Tensors, format: AnswerFormat) -> tuple[bytes, int]:
    """Return what ``Adapter.answer`` returns, in a format."""
    encoded, round = adapter.answer(support, query_x, format)
    if not format.as_json:
        return encoded, round
    found = {"round": round, **tensors_to_json(encoded)}
    return json.dumps(found, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode(), round


def decode_request(task: TaskSpec, limits: Limits, body: bytes) -> tuple[Batch, Tensors]:
    """Return the support set and the query inputs of a request to adapt.

    Raises ``Rejected`` if the body is not such a request.
    """
    return wire.decode_support(read_as_safetensors(body, task, limits), task, limits)


def describe_served(config: Config, leader: Path) -> bytes:
    """Return what the process needs to serve a branch: its configuration, and the file of its leader, as JSON."""
    parts = {
        "settings": TypeAdapter(TrainerSettings).dump_python(config.trainer(), mode="json"),
        "task": TypeAdapter(TaskSpec).dump_python(config.task, mode="json"),
        "limits": TypeAdapter(Limits).dump_python(config.serve.limits, mode="json"),
        "leader": str(leader),
    }
    return json.dumps(parts).encode()


def open_served(description: bytes, executor: Executor) -> Served:
    """Return the branch that ``describe_served`` describes, whose answers the one thread of ``executor`` records."""
    parts = json.loads(description)
    adapter = Adapter(parse_settings(parts["settings"]), Path(parts["leader"]), executor=executor)
    task = TypeAdapter(TaskSpec).validate_json(json.dumps(parts["task"]))
    limits = TypeAdapter(Limits).validate_json(json.dumps(parts["limits"]))
    return Served(adapter, task, limits)


class AnsweringLoop:
    """Answers the requests that arrive over a socket.

    Each thread in turn receives requests. While answers are quick, it keeps this turn; it passes the turn on before an
    answer that is expected to be slow.

    Args:
        channel: the socket, which ends the loop when the other end closes it.
    """

    def __init__(self, channel: socket.socket) -> None:
        """Serve nothing until the first frame says what."""
        self._channel, self._received = channel, bytearray()
        self._frames: Iterator[Frame] = iter(())
        self._receiving, self._sending = Lock(), Lock()
        self._served: Served | None = None
        self._executor = ThreadPoolExecutor(1, "record")
        self._last_seconds = 0.0

    def run(self) -> None:
        """Answer until the other end closes the socket."""
        for number in range(1, THREADS):
            Thread(target=self._work, name=f"answers-{number}", daemon=True).start()
        self._work()

    def _work(self) -> None:
        try:
            self._answer_each()
        except Exception:  # The other thread would go on without it, and one request without an answer.
            log.exception("this process cannot answer")
            os._exit(TRY_LATER)

    def _answer_each(self) -> None:
        while True:
            with self._receiving:
                frame = self._receive()
                if frame is None:
                    return
                if frame.kind == SERVE:
                    self._served = open_served(frame.body, self._executor)
                    self._send(Frame(frame.number, GIVEN, 0, b""))
                    continue
                served = self._served
                assert served is not None, "the first frame says what is served"
                if frame.kind == REHEARSE:
                    served.rehearse(frame.body, self._executor)
                    gc.freeze()  # A collection then need not look at all that the imports have made, for 0.1 s.
                    self._send(Frame(frame.number, GIVEN, 0, b""))
                    continue
                if self._last_seconds < QUICK_SECONDS:
                    self._answer(served, frame)
                    continue
            self._answer(served, frame)

    def _receive(self) -> Frame | None:
        """Return the next frame; None at the end."""
        while (frame := next(self._frames, None)) is None:
            try:
                data = self._channel.recv(RECEIVE_BYTES)
            except OSError:  # The connection is lost, or was closed after another thread had met its end.
                data = b""
            if not data:
                return None
            self._received += data
            self._frames = unpack_frames(self._received)
        return frame

    def _answer(self, served: Served, frame: Frame) -> None:
        began = time.thread_time()
        try:
            format, request = unpack_request(frame)
            body, round = served.answer(request, format)
            answer = Frame(frame.number, GIVEN, round, body)
        except Rejected as rejection:
            refused = {"reason": rejection.reason, "detail": rejection.detail}
            answer = Frame(frame.number, REJECTED, 0, json.dumps(refused).encode())
        except FileNotFoundError:
            answer = Frame(frame.number, NOT_READY, 0, b"")
        self._last_seconds = time.thread_time() - began
        self._send(answer)

    def _send(self, frame: Frame) -> None:
        with self._sending:
            try:
                self._channel.sendall(pack_frame(frame))
            except OSError:
                log.debug("the daemon has closed the connection")


def main(logs: str = "text") -> int:
    """Answer what the daemon passes on, until it closes the connection; return the exit code.

    Args:
        logs: "text" or "json".
    """
    log_to_stderr(Origin("answers"), logs)
    die_with_parent()
    with socket.socket(fileno=sys.stdin.fileno()) as channel:
        AnsweringLoop(channel).run()
    return DONE


if __name__ == "__main__":
    status = main(*sys.argv[1:])
    logging.shutdown()
    os._exit(status)  # A normal exit would wait for what is being recorded.
