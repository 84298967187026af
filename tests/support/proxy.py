"""A network between a client and a server that can be cut, can swallow data, and can be healed."""

import socket
import threading
from contextlib import suppress

from tests.support.daemon import free_port


class Proxy:
    """Forwards TCP connections to a port of this machine."""

    def __init__(self, port: int | None = None) -> None:
        """Listen; ``port`` is the target, and may be set later."""
        self.to = port
        self.port = free_port()
        self._open = threading.Event()  # not set: no data is forwarded, and connections stay open
        self._open.set()
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._changing = threading.Lock()
        self._ended = False
        self._refusing = False
        self._losing: int | None = None
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """Drop all connections, and refuse new ones."""
        self._refusing = True
        self._drop()

    def swallow(self) -> None:
        """Forward no data but keep the connections open, so that neither end notices."""
        self._open.clear()

    def lose_next_reply(self, least: int) -> None:
        """Drop the connection on which the server next sends ``least`` bytes or more at once, with those bytes."""
        self._losing = least

    def heal(self) -> None:
        """Forward everything again; swallowed data is lost with its connections, as after a long outage."""
        if not self._open.is_set():
            self._drop()
        self._refusing = False
        self._open.set()

    def close(self) -> None:
        self._ended = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._drop()
        self._open.set()
        self._thread.join()

    def _accept(self) -> None:
        while not self._ended:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                if self._refusing:
                    raise ConnectionRefusedError("cut")
                far = socket.create_connection(("127.0.0.1", self.to), timeout=10)
                far.settimeout(None)
            except OSError:
                near.close()
                continue
            pair = (near, far)
            with self._changing:
                self._pairs.add(pair)
            for here, there in (pair, pair[::-1]):
                threading.Thread(target=self._carry, args=(here, there, pair), daemon=True).start()

    def _carry(self, here: socket.socket, there: socket.socket, pair: tuple[socket.socket, socket.socket]) -> None:
        with suppress(OSError):
            while data := here.recv(65536):
                self._open.wait()
                if self._losing is not None and here is pair[1] and len(data) >= self._losing:
                    self._losing = None
                    break
                there.sendall(data)
        self._end(pair)

    def _drop(self) -> None:
        with self._changing:
            pairs = list(self._pairs)
        for pair in pairs:
            self._end(pair)

    def _end(self, pair: tuple[socket.socket, socket.socket]) -> None:
        with self._changing:
            self._pairs.discard(pair)
        for one in pair:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
