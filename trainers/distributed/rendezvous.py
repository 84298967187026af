"""Decide which machines play a run, and where their ranks meet; nothing that is received is unpickled.

torch's own dynamic rendezvous unpickles what other machines write, and listens on every interface. Here, a machine
that plays alone needs no port: its ranks meet in a file that only its user can open. With several machines, the first
one hosts a store at one address, with counters and JSON in it, and decides who plays.
"""

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from pathlib import Path

from torch._C._distributed_c10d import FileStore, HashStore, PrefixStore, Store, TCPStore
from torch.distributed.elastic.rendezvous.api import (
    RendezvousGracefulExitError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
)

STORE_VARIABLE = "ONLINE_META_STORE"
"""The environment variable that tells a rank where the ranks meet: a URL for ``open_store``."""
RUN_ID = "online-meta"
BEAT_SECONDS = 2.0
LOST_SECONDS = 3 * BEAT_SECONDS
"""A machine that is silent for this long is lost."""
LAST_CALL_SECONDS = 5.0
"""How long further machines may join after the smallest number is there."""
STOP_SECONDS = 60.0
"""How long a machine that plays or waits may take to be ready before the others continue without it."""
POLL_SECONDS = 0.1
CONNECT_SECONDS = 60.0


def open_store(url: str, timeout_seconds: float) -> Store:
    """Open the store where the ranks of a round of the rendezvous meet.

    Args:
        url: ``file:PATH`` on one machine, ``tcp:HOST:PORT:PREFIX`` on several.
        timeout_seconds: how long a rank waits for what another one writes.

    Raises:
        ValueError: for another URL.
    """
    kind, _, place = url.partition(":")
    if kind == "file":
        store: Store = FileStore(place)
    elif kind == "tcp":
        host, port, prefix = place.rsplit(":", 2)
        store = PrefixStore(prefix, _connect(host, int(port)))
    else:
        raise ValueError(f"{STORE_VARIABLE} = {url!r}: it begins with 'file:' or 'tcp:'")
    store.set_timeout(timedelta(seconds=timeout_seconds))
    return store


def split_address(rendezvous: str) -> tuple[str, int]:
    """Return the host and the port of "host:port"; brackets around an IPv6 address are removed."""
    host, _, port = rendezvous.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address of this machine, and to no other one.

    Raises:
        OSError: if the address does not belong to this machine or the port is in use.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


def _connect(host: str, port: int) -> TCPStore:
    return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=CONNECT_SECONDS), wait_for_workers=False)


class Rendezvous(RendezvousHandler):
    """What torch's agent asks on any machine; subclasses decide who plays, and where."""

    def get_backend(self) -> str:
        """Return the name of this rendezvous in torch's log lines."""
        return RUN_ID

    def get_run_id(self) -> str:
        """Return the name that torch's agent gives its files."""
        return RUN_ID

    def is_closed(self) -> bool:
        """Return False: the rendezvous lasts as long as the agent."""
        return False

    def set_closed(self) -> None:
        """Do nothing: the rendezvous lasts as long as the agent."""

    def num_nodes_waiting(self) -> int:
        """Return the number of machines for which the ranks must restart."""
        return 0

    def shutdown(self) -> bool:
        """Close what is open."""
        return True


class OneMachine(Rendezvous):
    """The rendezvous of a machine that plays alone: its ranks meet in a file, and nothing listens.

    Args:
        folder: for the files; it is emptied, and only this user can open it. The files of one start of the ranks are
            removed at the next.
    """

    def __init__(self, folder: Path) -> None:
        """Remove what a killed agent left behind."""
        self._folder, self._starts = folder, 0

    def next_rendezvous(self) -> RendezvousInfo:
        """Return at once, with a new file for the ranks."""
        self._starts += 1
        place = self._folder / str(self._starts)
        shutil.rmtree(self._folder / str(self._starts - 1), ignore_errors=True)
        place.mkdir(mode=0o700)
        os.environ[STORE_VARIABLE] = f"file:{place / 'store'}"  # The ranks inherit it.
        return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo("localhost", 0))


class HostingMachine(Rendezvous):
    """The rendezvous of the machine that hosts the store, and decides which machines play.

    It is always the first of them. Each start of the ranks has a number. The host announces the number, the machines
    that are ready for it say so, and the host publishes a list of those that play. A machine is alive while the
    counter that it increases keeps changing; clocks of different machines are never compared.

    Args:
        rendezvous: "host:port", an address of this machine.
        nodes: the smallest and the largest number of machines, counting this one.
        draining: whether the run ends; it is asked while machines are missing.
        now: a clock, in seconds.
    """

    def __init__(
        self,
        rendezvous: str,
        nodes: tuple[int, int],
        draining: Callable[[], bool],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Listen at the address. Raises ``OSError`` if that is impossible."""
        self._nodes, self._draining, self._now = nodes, draining, now
        with closing(bind(*split_address(rendezvous))) as listener:
            listener.listen(128)
            self._host, self._port = str(listener.getsockname()[0]), int(listener.getsockname()[1])
            self._store = TCPStore(
                self._host,
                self._port,
                is_master=True,
                master_listen_fd=os.dup(listener.fileno()),
                wait_for_workers=False,
            )
        self._start, self._players = 0, [0]
        self._beats: dict[int, tuple[bytes, float]] = {}
        self._looked = -BEAT_SECONDS
        self._store.set("start", "0")

    @property
    def address(self) -> tuple[str, int]:
        """The host and the port at which the store listens."""
        return self._host, self._port

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for the machines and decide which of them play next.

        Raises:
            RendezvousGracefulExitError: if the run ends while machines are missing.
        """
        # Machines that wait for this start have to say so for the next one, which may take them a moment.
        expected = {*self._players, *self._ready()}
        self._forget_start(self._start - 1)
        self._start += 1
        self._store.set("start", str(self._start))
        others = self._wait_for_others(expected)
        self._players = [0, *others]
        self._store.set(f"start-{self._start}/players", json.dumps(self._players))
        return _enter(self._store, self._host, self._port, self._start, self._players, 0)

    def num_nodes_waiting(self) -> int:
        """Return how many machines wait, if there is room for them."""
        now = self._now()
        if len(self._players) >= self._nodes[1] or now - self._looked < BEAT_SECONDS / 2:
            return 0
        self._looked = now
        return len(set(self._ready()) - set(self._players))

    def _wait_for_others(self, expected: set[int]) -> list[int]:
        smallest, largest = self._nodes
        began, last_call = self._now(), None
        while True:
            if self._draining():
                raise RendezvousGracefulExitError("the run ends before all machines are there")
            ready = self._ready()
            missing = set(self._alive()) & expected - set(ready)
            now = self._now()
            if len(ready) + 1 >= largest:
                return ready[: largest - 1]
            if len(ready) + 1 < smallest:
                last_call = None
            elif last_call is None:
                last_call = now
            elif now - last_call >= LAST_CALL_SECONDS and (not missing or now - began > STOP_SECONDS):
                return ready
            time.sleep(POLL_SECONDS)

    def _ready(self) -> list[int]:
        """Return the machines that are alive and wait for the current start."""
        return [machine for machine in self._alive() if self._store.check([f"start-{self._start}/ready-{machine}"])]

    def _alive(self) -> list[int]:
        """Return the machines whose counters have changed within ``LOST_SECONDS``, in the order in which they came."""
        now, alive = self._now(), []
        for machine in range(1, self._store.add("machines", 0) + 1):
            key = f"beat-{machine}"
            if not self._store.check([key]):  # It has left, or has not begun.
                self._beats.pop(machine, None)
                continue
            beat, seen = self._store.get(key), now
            if machine in self._beats and self._beats[machine][0] == beat:
                seen = self._beats[machine][1]
            self._beats[machine] = beat, seen
            if now - seen <= LOST_SECONDS:
                alive.append(machine)
        return alive

    def _forget_start(self, start: int) -> None:
        """Delete the keys of a start, so that the store does not grow with the number of restarts."""
        for key in self._store.list_keys():
            if key.startswith(f"start-{start}/"):
                self._store.delete_key(key)


class JoiningMachine(Rendezvous):
    """The rendezvous of a machine that joins a run which another machine hosts.

    Args:
        rendezvous: "host:port" of the host.
    """

    def __init__(self, rendezvous: str) -> None:
        """Connect to the host, and begin to tell it that this machine is alive.

        Raises:
            RuntimeError: if the host cannot be reached within ``CONNECT_SECONDS``.
        """
        self._host, self._port = split_address(rendezvous)
        self._store = _connect(self._host, self._port)
        self._machine = self._store.add("machines", 1)
        self._start = 0
        self._left = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="beat", daemon=True)
        self._beating.start()

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait until the host lets this machine play. Raises ``RuntimeError`` if the host ends."""
        while True:
            start = int(self._store.get("start"))
            if start > self._start:
                self._store.set(f"start-{start}/ready-{self._machine}", "")
                if self._store.check([f"start-{start}/players"]):
                    players = json.loads(self._store.get(f"start-{start}/players"))
                    if self._machine in players:
                        self._start = start
                        rank = players.index(self._machine)
                        return _enter(self._store, self._host, self._port, start, players, rank)
            time.sleep(POLL_SECONDS)

    def num_nodes_waiting(self) -> int:
        """Return 1 if the host prepares another start, else 0."""
        return 1 if int(self._store.get("start")) > self._start else 0

    def shutdown(self) -> bool:
        """Tell the host that this machine leaves."""
        self._left.set()
        self._beating.join(BEAT_SECONDS)
        return True

    def _beat(self) -> None:
        # With a connection of its own: a wait in the other one must not delay a beat.
        try:
            store, beats = _connect(self._host, self._port), 0
            while not self._left.is_set():
                store.set(f"beat-{self._machine}", str(beats))
                beats += 1
                self._left.wait(BEAT_SECONDS)
            store.delete_key(f"beat-{self._machine}")
        except RuntimeError:  # The host has ended; the other connection says so, too.
            return


def _enter(store: Store, host: str, port: int, start: int, players: list[int], rank: int) -> RendezvousInfo:
    prefix = f"start-{start}"
    os.environ[STORE_VARIABLE] = f"tcp:{host}:{port}:{prefix}/ranks"  # The ranks inherit it.
    return RendezvousInfo(PrefixStore(f"{prefix}/agents", store), rank, len(players), RendezvousStoreInfo(host, port))
