"""Repeated SIGKILLs of every process lose nothing that was acknowledged and change no bit."""

import json
import random
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from streams.formats import wire
from streams.history.history import History
from streams.history.verify import verify
from streams.producers import submit
from streams.sources.sinusoid import make_task
from tests.support.daemon import RestartedDaemon, hash_of, wait_for

SEED = 11
SEALED = "[history.sealing]\nsegment_rounds = 7\nledger_bytes = 0\n"
"""Seal every full segment, and keep its rounds only in the archive."""


def body(number: int) -> bytes:
    return wire.encode(make_task(SEED, number, 5, 5))


class Client(threading.Thread):
    """Submits tasks one after the other, each until it is acknowledged, and records the acknowledged ones."""

    def __init__(self, served: RestartedDaemon) -> None:
        super().__init__(daemon=True)
        self.served = served
        self.acknowledged: dict[str, int] = {}
        self.stop = threading.Event()

    def run(self) -> None:
        number = 0
        while not self.stop.is_set():
            receipt = submit(self.served.url, f"t{number}", body(number))
            self.acknowledged[receipt.id] = receipt.round
            number += 1
            time.sleep(0.1)


def finish(served: RestartedDaemon, rounds: int) -> None:
    """Wait until all rounds are learned, and drain."""
    wait_for("all rounds are learned", lambda: served.status()["rounds"]["pending"] == 0, 240)
    assert served.status()["rounds"]["ingested"] == rounds
    assert served.drain() == 0


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("together", [1, 8])
def test_kill_every_process_at_random_moments(tmp_path: Path, kills: int, together: int) -> None:
    chance = random.Random(SEED + together)
    served = RestartedDaemon(tmp_path / "killed", together, SEALED if together == 1 else "")
    client = Client(served)
    client.start()
    victims = ["daemon", "trainer", "comparators"] * kills
    chance.shuffle(victims)
    for victim in victims:
        time.sleep(chance.uniform(0.0, 1.5))
        wait_for(f"the {victim} is alive and is killed", partial(served.kill, victim))
    client.stop.set()
    client.join(120)
    assert not client.is_alive()
    acknowledged = client.acknowledged
    markers, full = served.run / "history" / "archive" / "markers", len(acknowledged) // 7 if together == 1 else 0
    # Sealing yields to all other work, so it lags behind on a busy machine.
    wait_for("every full segment is sealed", lambda: len([*markers.glob("*.json")]) == full, 240)
    finish(served, len(acknowledged))

    assert sorted(acknowledged.values()) == list(range(len(acknowledged))), "each task is one round"
    with History.open(served.run / "history", write=False) as history:
        for id, round in acknowledged.items():
            assert history.find(id) == round
            assert history.payload(round) == body(int(id[1:]))
    assert verify(served.run / "history").clean
    assert len([*markers.glob("*.json")]) == full
    lines = [json.loads(line) for line in (served.run / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == list(range(len(acknowledged)))

    replayed = tmp_path / "replayed"
    command = [sys.executable, "-m", "online_meta", "replay", str(served.config), "--out", str(replayed)]
    subprocess.run([*command, "--set", "regret.comparator=[]"], check=True, stdout=subprocess.DEVNULL)
    assert served.hash() == hash_of(replayed / "checkpoints")

    if together == 1:  # With 8, timing decides which rounds share an update, and only a replay repeats it.
        unharmed = RestartedDaemon(tmp_path / "unharmed")
        for number in range(len(acknowledged)):
            submit(unharmed.url, f"t{number}", body(number))
        finish(unharmed, len(acknowledged))
        assert served.hash() == unharmed.hash()
    else:
        plans = [json.loads(line) for line in (served.run / "history" / "plans.jsonl").read_text().splitlines()]
        assert max(plan["rounds"] for plan in plans) > 1, "some rounds shared an update"


def test_ingest_continues_while_the_trainer_is_dead(tmp_path: Path) -> None:
    served = RestartedDaemon(tmp_path)
    for number in range(30):
        served.kill("trainer")
        assert submit(served.url, f"t{number}", body(number), retry_seconds=20).round == number
    finish(served, 30)


def test_sigterm_drains_and_the_next_daemon_continues(tmp_path: Path) -> None:
    served = RestartedDaemon(tmp_path)
    for number in range(40):
        submit(served.url, f"t{number}", body(number))
    assert served.drain() == 0
    before = json.loads((served.run / "report.json").read_text())
    served.start()
    finish(served, 40)
    after = json.loads((served.run / "report.json").read_text())
    assert before["rounds"] <= after["rounds"] == 40
    assert (served.run / "checkpoints" / "LATEST").read_text().strip() == "40"
