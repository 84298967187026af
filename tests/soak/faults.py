"""The faults that a daemon meets within months, one per minute."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import httpx
import psutil

from streams.producers import submit
from tests.deploy.fill_disk import fill
from tests.soak.arriving import RETRY_SECONDS, body_of
from tests.soak.clock import Clock
from tests.soak.numbers import negative_numbers
from tests.support.daemon import RestartedDaemon, wait_for
from tests.support.servers import Redis

BACKLOG = 200
HELD_SECONDS = 5.0
CLIENTS = 16


class Scene(NamedTuple):
    """A served run, its broker, its clock (None if it cannot be shifted), and the tasks acknowledged here."""

    served: RestartedDaemon
    redis: Redis
    clock: Clock | None
    acknowledged: list[dict[str, object]]


def kill_daemon(scene: Scene) -> str:
    scene.served.kill("daemon")
    return "kill -9, started again"


def kill_trainer(scene: Scene) -> str:
    pids = wait_for("there is a trainer", lambda: scene.served.children("trainer"))
    assert scene.served.kill("trainer")
    wait_for("the trainer is back", lambda: set(scene.served.children("trainer")) - set(pids))
    return "kill -9, the daemon starts another"


def stop_daemon(scene: Scene) -> str:
    process = psutil.Process(scene.served.process.pid)
    process.suspend()
    time.sleep(HELD_SECONDS)
    process.resume()
    return f"SIGSTOP for {HELD_SECONDS:g} s"


def stop_trainer(scene: Scene) -> str:
    (pid,) = wait_for("there is a trainer", lambda: scene.served.children("trainer"))
    psutil.Process(pid).suspend()
    time.sleep(HELD_SECONDS)
    psutil.Process(pid).resume()
    return f"SIGSTOP for {HELD_SECONDS:g} s"


def kill_broker(scene: Scene) -> str:
    scene.redis.kill()
    time.sleep(HELD_SECONDS)
    scene.redis.start()
    return f"kill -9 of Redis, started again after {HELD_SECONDS:g} s"


def fill_disk(scene: Scene) -> str:
    """Fill the disk for some seconds; meanwhile a task is refused."""
    filler = scene.served.run / "filler"
    try:
        fill(filler)
        status = wait_for("a task is refused", lambda: refusal_status(scene), 120)
        time.sleep(HELD_SECONDS)
    finally:
        filler.unlink()
    return f"answered {status}, {HELD_SECONDS:g} s more"


def refusal_status(scene: Scene) -> int | None:
    """Return the status that refuses the next task, 507 or 429 (backlog full), or None; record an accepted task."""
    id = f"full-{len(scene.acknowledged)}"
    headers = {"Idempotency-Key": id, "Content-Type": "application/octet-stream"}
    answer = httpx.post(f"{scene.served.url}/v1/tasks", content=body_of(id), headers=headers, timeout=60)
    if answer.is_success:
        scene.acknowledged.append({"id": id, "round": answer.json()["round"]})
    return answer.status_code if answer.status_code in (429, 507) else None


def jump_clock(scene: Scene) -> str:
    """Shift the wall clock back and forth; no number that the daemon reports may become negative."""
    assert scene.clock is not None
    negative = []
    for shift in ("+5h", "-3h", "+9d", "-2d", "+0"):
        scene.clock.shift(shift)
        time.sleep(HELD_SECONDS)
        negative += [f"{name} {value:g} at {shift}" for name, value in negative_numbers(scene.served)]
    assert not negative, negative
    return "5 hours on, 8 back, 9 days on, 11 back, and right again"


def burst(scene: Scene) -> str:
    """Send more tasks at once than the backlog holds; the daemon answers 429 and the clients retry."""
    first = len(scene.acknowledged)
    ids = [f"burst-{number}" for number in range(first, first + 2 * BACKLOG)]

    def send_task(id: str) -> dict[str, object]:
        receipt = submit(scene.served.url, id, body_of(id), retry_seconds=RETRY_SECONDS)
        return {"id": id, "round": receipt.round}

    with ThreadPoolExecutor(CLIENTS) as pool:
        scene.acknowledged.extend(pool.map(send_task, ids))
    return f"{len(ids)} tasks from {CLIENTS} clients, {BACKLOG} may wait"


FAULTS: dict[str, Callable[[Scene], str]] = {
    "daemon killed": kill_daemon,
    "trainer killed": kill_trainer,
    "disk full": fill_disk,
    "broker killed": kill_broker,
    "daemon stopped": stop_daemon,
    "trainer stopped": stop_trainer,
    "clock jumps": jump_clock,
    "burst": burst,
}


def possible(scene: Scene) -> list[str]:
    """Return the names of the faults that are possible here, in order."""
    able = {"disk full": os.path.ismount(scene.served.run), "clock jumps": scene.clock is not None}
    return [name for name in FAULTS if able.get(name, True)]
