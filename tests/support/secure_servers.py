"""The brokers with passwords, tokens and TLS."""

import asyncio
import socket
import ssl
from pathlib import Path
from typing import Any

from streams.brokers.nats import EventLoopThread
from tests.support.certificate import write_certificate
from tests.support.servers import Kafka, Nats, Redis, succeeds

USER, PASSWORD = "alice", "open-sesame-7"


class SecureRedis(Redis):
    """Redis for one user, over TLS with a client certificate."""

    def command(self) -> list[str]:
        write_certificate(self.folder)
        users = self.folder / "redis.conf"
        users.write_text(f"user {USER} on >{PASSWORD} ~* &* +@all\nuser default off\n")
        program, *others = super().command()
        at = others.index("--port")
        tls = {"tls-port": self.port, "tls-cert-file": "cert.pem", "tls-key-file": "key.pem"}
        flags = [word for name, value in tls.items() for word in (f"--{name}", str(value))]
        others[at + 1] = "0"
        return [program, str(users), *others, *flags, "--tls-ca-cert-file", "cert.pem"]

    def client(self) -> Any:
        import redis

        login = {"username": USER, "password": PASSWORD, "ssl": True}
        cert, key = str(self.folder / "cert.pem"), str(self.folder / "key.pem")
        files = {"ssl_ca_certs": cert, "ssl_certfile": cert, "ssl_keyfile": key}
        return redis.Redis(port=self.port, host="127.0.0.1", protocol=2, socket_timeout=30, **login, **files)


class SecureNats(Nats):
    """NATS for one user, over TLS."""

    def command(self) -> list[str]:
        write_certificate(self.folder)
        command = super().command()
        with open(command[-1], "a") as config:
            config.write(f'authorization {{ user: "{USER}", password: "{PASSWORD}" }}\n')
            config.write('tls { cert_file: "cert.pem", key_file: "key.pem" }\n')
        return command

    def connection_options(self) -> dict[str, Any]:
        trust = ssl.create_default_context(cafile=str(self.folder / "cert.pem"))
        return {"user": USER, "password": PASSWORD, "tls": trust}


class TokenNats(Nats):
    """NATS with a token."""

    def command(self) -> list[str]:
        command = super().command()
        with open(command[-1], "a") as config:
            config.write(f'authorization {{ token: "{PASSWORD}" }}\n')
        return command

    def connection_options(self) -> dict[str, Any]:
        return {"token": PASSWORD}


class TlsFront:
    """Terminates TLS, and forwards the data to a server without TLS."""

    def __init__(self, folder: Path) -> None:
        """Listen, with a certificate written into the folder; ``to`` is set later."""
        folder.mkdir(parents=True, exist_ok=True)
        write_certificate(folder)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
        self.to = 0
        self._loop = EventLoopThread("tls-front")
        self._server = self._loop.run(asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=context), 30)
        self.port: int = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        self._server.close()
        self._loop.close()

    async def _serve(self, near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        far, there = await asyncio.open_connection("127.0.0.1", self.to)
        try:
            await asyncio.gather(_carry(near, there), _carry(far, back))
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            back.close()
            there.close()


async def _carry(here: asyncio.StreamReader, there: asyncio.StreamWriter) -> None:
    while data := await here.read(65536):
        there.write(data)
        await there.drain()
    there.close()


class SecureKafka(Kafka):
    """Kafka over TLS, without a login."""

    def __init__(self, folder: Path) -> None:
        self.front = TlsFront(folder)
        super().__init__(folder, self.front.port)
        self.front.to = self.port

    def connection_options(self) -> dict[str, Any]:
        return {"bootstrap.servers": self.brokers, **self.properties()}

    def properties(self) -> dict[str, str]:
        return {"security.protocol": "SSL", "ssl.ca.location": str(self.folder / "cert.pem")}

    def stop(self) -> None:
        super().stop()
        self.front.close()


class ClosedKafka(Kafka):
    """Kafka that requires a login and has no users, because its data is in memory."""

    def command(self) -> list[str]:
        return [*super().command(), "--authentication"]

    def answers(self) -> bool:
        return succeeds(lambda: socket.create_connection(("127.0.0.1", self.port)).close())

    def properties(self) -> dict[str, str]:
        sasl = {"security.protocol": "SASL_PLAINTEXT", "sasl.mechanism": "SCRAM-SHA-512"}
        return {**sasl, "sasl.username": USER, "sasl.password": PASSWORD}
