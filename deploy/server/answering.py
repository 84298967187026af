"""Let a process of its own answer the requests to adapt, once there are more than a few."""

import asyncio
import json
import logging
import socket
import sys
from collections.abc import Callable, Coroutine
from itertools import count
from typing import Any, NamedTuple

from deploy.leader import Adapter
from deploy.logs import copy_lines
from deploy.predictions import AnswerFormat
from deploy.processes.answers import (
    NOT_READY,
    REHEARSE,
    REJECTED,
    SERVE,
    Frame,
    describe_served,
    pack_frame,
    pack_request,
    unpack_frames,
)
from deploy.processes.supervisor import SupervisedProcess
from deploy.server.state import DaemonState
from streams.types import Rejected

START_AFTER = 20
"""Requests after which the process is started: it takes memory, which a run that answers no one keeps."""
STOP_SECONDS = 5.0
log = logging.getLogger(__name__)


class Answered(NamedTuple):
    """An answer in the format that was asked for, and the number of rounds that its leader has learned."""

    body: bytes
    round: int


class Disconnected(Exception):
    """The process has ended before it answered."""


class AnsweringProcess:
    """The process that answers, and the connection to it; use it from the event loop only, ``close`` excepted.

    While it does not run yet, or opens another branch, ``is_ready`` is false: the daemon then answers itself.

    Args:
        state: of the daemon.
    """

    def __init__(self, state: DaemonState) -> None:
        """Start nothing."""
        self._state = state
        self._requests = 0
        self._child: SupervisedProcess | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connection: _Connection | None = None
        self._asked: Adapter | None = None  # of the branch that the process opens, or has opened
        self._opened: Adapter | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def pid(self) -> int | None:
        """The id of the process; None before it is started."""
        return None if self._child is None else self._child.pid

    def is_ready(self, body: bytes) -> bool:
        """Return whether the process can answer a request now; count the request.

        Before it is ready, it rehearses answers to such a ``body``.
        """
        self._requests += 1
        if self._child is None and self._requests > START_AFTER:
            self._start()
        if self._connection is None:
            return False
        adapter = self._state.adapter
        if self._asked is not adapter:
            self._asked = adapter
            self._keep(self._open(self._connection, adapter, body))
        return self._opened is adapter

    async def answer(self, body: bytes, format: AnswerFormat) -> Answered | None:
        """Return the answer of the process to a request's body, in a format; None if it ends before it has answered.

        Raises:
            Rejected: as the daemon itself would refuse the request.
            FileNotFoundError: if no leader has been published.
        """
        connection = self._connection
        if connection is None:
            return None
        try:
            found = await connection.ask(*pack_request(format, body))
        except Disconnected:
            return None
        if found.kind == REJECTED:
            refused = json.loads(found.body)
            raise Rejected(refused["reason"], refused["detail"])
        if found.kind == NOT_READY:
            raise FileNotFoundError(self._state.files.leader)
        return Answered(found.body, found.round)

    def close(self) -> None:
        """End the process; requests in progress have ended before."""
        if self._child is not None:
            self._child.stop(STOP_SECONDS)

    def _start(self) -> None:
        self._loop = asyncio.get_running_loop()
        logs = self._state.config.run.logs
        command = [sys.executable, "-m", "deploy.processes.answers", logs]
        copy = copy_lines if logs == "json" else None
        self._child = SupervisedProcess("answers", command, copy=copy, open_input=self._open_input)

    def _open_input(self) -> socket.socket:
        """Return the end of a connection that becomes the standard input of the process which starts."""
        own, other = socket.socketpair()
        loop = self._loop
        assert loop is not None
        try:
            loop.call_soon_threadsafe(lambda: self._keep(self._connect(own)))
        except RuntimeError:  # The loop has ended, and so does the daemon.
            own.close()
        return other

    async def _connect(self, own: socket.socket) -> None:
        assert self._loop is not None
        _, connection = await self._loop.create_unix_connection(lambda: _Connection(self._disconnect), sock=own)
        self._connection, self._asked, self._opened = connection, None, None

    def _disconnect(self, connection: "_Connection") -> None:
        if self._connection is connection:
            self._connection = self._asked = self._opened = None

    async def _open(self, connection: "_Connection", adapter: Adapter, body: bytes) -> None:
        """Let the process serve the branch of an adapter, once its answers to requests like ``body`` are recorded."""
        state = self._state
        try:
            await connection.ask(SERVE, describe_served(state.config, state.files.leader))
            await connection.ask(REHEARSE, body)
        except Disconnected:
            return
        if self._connection is connection and self._asked is adapter:
            self._opened = adapter
            log.info("a process of its own answers requests from now on (pid %s)", self.pid)

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)  # The loop itself would forget it.
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Connection(asyncio.Protocol):
    """The connection to the process: frames with requests out, frames with answers in, in any order."""

    def __init__(self, on_lost: "Callable[[_Connection], None]") -> None:
        self._on_lost = on_lost
        self._received, self._numbers = bytearray(), count()
        self._waiting: dict[int, asyncio.Future[Frame]] = {}
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self._received += data
        for frame in unpack_frames(self._received):
            waiting = self._waiting.pop(frame.number, None)
            if waiting is not None and not waiting.done():
                waiting.set_result(frame)

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_lost(self)
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(Disconnected())
        self._waiting.clear()
        self._transport = None

    async def ask(self, kind: int, body: bytes) -> Frame:
        """Return the frame with the answer; raises ``Disconnected``."""
        if self._transport is None:
            raise Disconnected
        number = next(self._numbers)
        waiting = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._transport.write(pack_frame(Frame(number, kind, 0, body)))
        found: Frame = await waiting
        return found
