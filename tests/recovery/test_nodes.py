"""A second machine joins, dies, rejoins and is disconnected: the run continues and gives the same bits."""

import json
from contextlib import nullcontext

import pytest

from tests.recovery.test_ranks import feed, settle
from tests.support.daemon import RestartedDaemon, free_port, wait_for
from tests.support.nodes import LOOPBACK, Node, can_create_namespaces, lay_cable

ENGINE = """
[engine]
kind = "deepspeed"
processes = 1
nodes = [1, 2]
rendezvous = "{address}:{port}"
trusted_network = true
zero_stage = 1
batching = "loop"
deterministic = true
timeout_seconds = 6.0
"""
TASKS = 34


@pytest.fixture
def link():
    """Yield the connection of the two machines: a virtual cable if this user may create one, else loopback."""
    with lay_cable() if can_create_namespaces() else nullcontext(LOOPBACK) as link:
        yield link


@pytest.mark.timeout(400)
def test_a_machine_can_join_die_and_rejoin(tmp_path, link):
    port = free_port()
    served = RestartedDaemon(tmp_path / "daemon", more=ENGINE.format(address=link.here, port=port))
    config = served.config.read_text().replace(str(served.run), str(tmp_path / "node" / "run"))
    node = None
    try:
        feed(served, 0, 5)
        settle(served, 5)
        node = Node(tmp_path / "node", config, link)
        wait_for("the node joins", lambda: node.joined() == 1)
        feed(served, 5, 15)
        settle(served, 15)
        node.die()
        feed(served, 15, 20)
        settle(served, 20)
        node = Node(tmp_path / "node", config, link)
        wait_for("the node joins again", lambda: node.joined() == 2)
        feed(served, 20, 25)
        settle(served, 25)
        if link.inside:
            link.pull(up=False)
            feed(served, 25, 30)
            settle(served, 30)
            link.pull(up=True)
            node.die()
            node = Node(tmp_path / "node", config, link)
            wait_for("the node joins once more", lambda: node.joined() == 3)
        feed(served, 30 if link.inside else 25, TASKS)
        settle(served, TASKS)
        assert served.drain() == 0
        assert node.process.wait(60) == 0
    finally:
        for process in (served.process, *([node.process] if node else [])):
            process.kill()
            process.wait()
    assert not (tmp_path / "node" / "run" / "history").exists(), "its tasks arrived over the network"
    unharmed = RestartedDaemon(tmp_path / "unharmed", more=ENGINE.format(address="127.0.0.1", port=free_port()))
    feed(unharmed, 0, TASKS)
    settle(unharmed, TASKS)
    assert unharmed.drain() == 0
    assert served.hash() == unharmed.hash()
    lines = [json.loads(line) for line in (served.run / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == list(range(TASKS))
    assert "does not repeat" not in (tmp_path / "daemon" / "daemon.log").read_text()
