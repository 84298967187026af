"""A second machine takes part, is lost, comes back and is cut off: the run goes on, and its bits are the same."""

import json

import pytest

from tests.daemon import free_port, wait_for
from tests.recovery.nodes import LOOPBACK, Node, allowed, cable
from tests.recovery.served import Served
from tests.recovery.test_ranks import feed, settle

ENGINE = """
[engine]
kind = "deepspeed"
processes = 1
nodes = [1, 2]
rendezvous = "{address}:{port}"
zero_stage = 1
how = "loop"
deterministic = true
timeout_seconds = 6.0
"""


@pytest.fixture(params=["loopback", "namespace"] if allowed() else ["loopback"])
def by(request, monkeypatch):
    """How the two reach each other."""
    if request.param == "loopback":
        yield LOOPBACK
        return
    with cable() as laid:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", laid.interface_here)
        yield laid


@pytest.mark.timeout(400)
def test_a_machine_joins_is_lost_and_joins_again(tmp_path, by):
    port = free_port()
    served = Served(tmp_path / "daemon", more=ENGINE.format(address=by.here, port=port))
    config = served.config.read_text().replace(str(served.run), str(tmp_path / "node" / "run"))
    node = None
    try:
        feed(served, 0, 5)
        settle(served, 5)
        node = Node(tmp_path / "node", config, port, by)
        wait_for("it takes part", lambda: node.joined() == 1, 60)
        feed(served, 5, 15)
        settle(served, 15)
        node.die()
        feed(served, 15, 20)
        settle(served, 20)
        node = Node(tmp_path / "node", config, port, by)
        wait_for("it takes part again", lambda: node.joined() == 2, 60)
        feed(served, 20, 30)
        settle(served, 30)
        assert served.drain() == 0
        assert node.process.wait(60) == 0
    finally:
        for process in (served.process, *([node.process] if node else [])):
            process.kill()
            process.wait()
    assert not (tmp_path / "node" / "run" / "history").exists(), "its tasks came over the network"
    unharmed = Served(tmp_path / "unharmed", more=ENGINE.format(address="127.0.0.1", port=free_port()))
    feed(unharmed, 0, 30)
    settle(unharmed, 30)
    assert unharmed.drain() == 0
    assert served.hash() == unharmed.hash()
    lines = [json.loads(line) for line in (served.run / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == list(range(30))
    assert "does not repeat" not in (tmp_path / "daemon" / "daemon.log").read_text()
