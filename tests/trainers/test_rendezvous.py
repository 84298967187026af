"""Which machines play a run, who can reach where they meet, and what is done with what arrives there."""

import os
import pickle
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from torch._C._distributed_c10d import TCPStore
from torch.distributed.elastic.rendezvous.api import RendezvousGracefulExitError, RendezvousInfo

from tests.support.daemon import free_port, wait_for
from trainers.distributed import rendezvous
from trainers.distributed.process_group import join_process_group
from trainers.distributed.rendezvous import (
    LOST_SECONDS,
    STORE_VARIABLE,
    HostingMachine,
    JoiningMachine,
    OneMachine,
    open_store,
)
from trainers.settings import EngineSettings


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let machines answer at once, and restore the variable that the ranks inherit."""
    monkeypatch.setattr(rendezvous, "LAST_CALL_SECONDS", 0.0)
    monkeypatch.setattr(rendezvous, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(rendezvous, "BEAT_SECONDS", 0.05)
    monkeypatch.setenv(STORE_VARIABLE, "")


class Clock:
    """A clock that a test moves; the host looks at it once a second."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def listening() -> set[tuple[str, int]]:
    """Return the addresses at which this process listens."""
    return {one.laddr for one in psutil.Process().net_connections() if one.status == psutil.CONN_LISTEN}


def host(nodes: tuple[int, int] = (1, 2), now: Callable[[], float] | None = None) -> HostingMachine:
    return HostingMachine(f"127.0.0.1:{free_port()}", nodes, lambda: False, *([now] if now else []))


def join(hosting: HostingMachine) -> JoiningMachine:
    return JoiningMachine("{}:{}".format(*hosting.address))


def start_together(hosting: HostingMachine, joining: JoiningMachine) -> tuple[RendezvousInfo, RendezvousInfo]:
    """Return what both machines get once the host sees that the other one waits."""
    with ThreadPoolExecutor() as pool:
        joined = pool.submit(joining.next_rendezvous)
        wait_for("the machine waits", hosting._ready)
        wait_for("the host notices", hosting.num_nodes_waiting)
        return hosting.next_rendezvous(), joined.result(60)


def test_one_machine_meets_in_a_file_that_only_its_user_can_open(tmp_path: Path) -> None:
    folder = tmp_path / "rendezvous"
    folder.mkdir(mode=0o700)
    before = listening()
    machine = OneMachine(folder)
    files = []
    for _ in range(2):
        info = machine.next_rendezvous()
        assert (info.rank, info.world_size) == (0, 1)
        store = open_store(os.environ[STORE_VARIABLE], 5.0)
        assert not store.check(["key"]), "each start of the ranks has a store of its own"
        store.set("key", "value")
        file = Path(os.environ[STORE_VARIABLE].removeprefix("file:"))
        assert file.exists()
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
        files.append(file)
    assert not files[0].exists(), "the files of the last start are removed"
    assert listening() == before


def test_the_host_listens_at_its_address_only() -> None:
    before = listening()
    hosting = host()
    assert listening() - before == {hosting.address}


def test_a_port_in_use_and_an_address_of_another_machine_are_refused() -> None:
    taken = host()
    with pytest.raises(OSError, match="in use"):
        HostingMachine("{}:{}".format(*taken.address), (1, 2), lambda: False)
    with pytest.raises(OSError, match="assign requested address"):
        HostingMachine("192.0.2.77:29400", (1, 2), lambda: False)


def test_the_host_plays_alone_until_another_machine_joins_and_after_it_is_lost() -> None:
    clock = Clock()
    hosting = host(now=clock)
    alone = hosting.next_rendezvous()
    assert (alone.rank, alone.world_size) == (0, 1)
    clock.seconds += 1.0
    joining = join(hosting)
    first, second = start_together(hosting, joining)
    assert [(info.rank, info.world_size) for info in (first, second)] == [(0, 2), (1, 2)]
    assert hosting.num_nodes_waiting() == joining.num_nodes_waiting() == 0
    first.store.set("key", "value")
    assert second.store.get("key") == b"value"
    joining._left.set()  # As if it lost its power: it says nothing any more, not even that it leaves.
    joining._beating.join(60)
    hosting._store.set("beat-1", "its last beat")
    assert hosting._alive() == [1]
    clock.seconds += LOST_SECONDS + 1.0
    alone = hosting.next_rendezvous()
    assert (alone.rank, alone.world_size) == (0, 1)


def test_a_machine_that_leaves_is_not_waited_for() -> None:
    hosting = host(now=Clock())
    hosting.next_rendezvous()
    joining = join(hosting)
    wait_for("it is seen", hosting._alive)
    joining.shutdown()
    wait_for("it has left", lambda: not hosting._alive())


def test_machines_that_are_too_many_wait() -> None:
    clock = Clock()
    hosting = host((2, 2), clock)
    joining, spare = join(hosting), join(hosting)
    with ThreadPoolExecutor() as pool:
        joined = pool.submit(joining.next_rendezvous)
        assert hosting.next_rendezvous().world_size == joined.result(60).world_size == 2

        def wait() -> None:
            with suppress(RuntimeError):  # The host ends.
                spare.next_rendezvous()

        threading.Thread(target=wait, daemon=True).start()
        wait_for("the third is ready", lambda: hosting._store.check(["start-1/ready-2"]))
        clock.seconds += 10.0
        assert hosting.num_nodes_waiting() == 0


def test_a_run_that_ends_does_not_wait_for_missing_machines() -> None:
    hosting = HostingMachine(f"127.0.0.1:{free_port()}", (2, 2), lambda: True)
    with pytest.raises(RendezvousGracefulExitError):
        hosting.next_rendezvous()


def test_the_store_does_not_grow_with_the_number_of_starts() -> None:
    hosting = host()
    sizes = []
    for _ in range(6):
        hosting.next_rendezvous().store.set("key", "value")
        sizes.append(hosting._store.num_keys())
    assert sizes[-1] == sizes[2]


def test_ranks_that_torchrun_starts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STORE_VARIABLE)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(ValueError, match=r"`python -m deploy.processes.join CONFIG.toml`, not by torchrun"),
        join_process_group(EngineSettings("deepspeed")),
    ):
        pass


class Payload:
    """An object that makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self._file,)


def test_nothing_that_arrives_is_unpickled(tmp_path: Path) -> None:
    """A client without credentials writes a pickle under every name that is in use, and under torch's own."""
    mark = tmp_path / "mark"
    payload = pickle.dumps(Payload(mark))
    hosting = host()
    hosting.next_rendezvous()
    joining = join(hosting)
    start_together(hosting, joining)
    attacker = TCPStore(*hosting.address, is_master=False)
    for key in {*attacker.list_keys(), "torch.rendezvous.online-meta", "init/torch.rendezvous.online-meta"}:
        attacker.set(key, payload)
    for act in (hosting.num_nodes_waiting, hosting._alive, joining.num_nodes_waiting, joining.next_rendezvous):
        try:
            act()
        except (RuntimeError, ValueError):  # It may fail on such a value, as long as it runs nothing.
            continue
    assert not mark.exists()
    pickle.loads(payload)
    assert mark.exists(), "the payload works"
