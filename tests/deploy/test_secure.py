"""A token and TLS."""

import ssl
from collections.abc import Iterator

import httpx
import pytest

from deploy.config.config import read_config
from tests.deploy.conftest import Cli
from tests.support.certificate import write_certificate
from tests.support.daemon import Daemon, free_port, running_daemon, sinusoid, wait_for, write_sinusoid

TOKEN = "correct-horse-battery-staple"


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("secure")
    write_certificate(folder)
    (folder / "token").write_text(f"{TOKEN}\n")
    files = {"token_file": "token", "tls_cert": "cert.pem", "tls_key": "key.pem"}
    settings = {key: folder / name for key, name in files.items()} | {"probes": f"127.0.0.1:{free_port()}"}
    config = write_sinusoid(folder, "".join(f'{key} = "{value}"\n' for key, value in settings.items()))
    trust = ssl.create_default_context(cafile=str(folder / "cert.pem"))
    with running_daemon(config, "regret.comparator=[]", "regret.baselines=[]", verify=trust) as running:
        yield running


def test_the_daemon_speaks_only_tls(daemon: Daemon) -> None:
    assert daemon.url.startswith("https://")
    with pytest.raises(httpx.TransportError):
        httpx.get(daemon.url.replace("https", "http") + "/healthz", trust_env=False)
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"{daemon.url}/healthz", trust_env=False)


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer wrong", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x", "Bearer \xe4"]
)
@pytest.mark.parametrize("path", ["/v1/status", "/v1/weights", "/metrics", "/readyz", "/no"])
def test_reading_requires_the_token(daemon: Daemon, path: str, header: str) -> None:
    answer = daemon.client.get(path, headers={"Authorization": header.encode("latin1")})
    assert (answer.status_code, answer.json()["reason"]) == (401, "unauthorized")
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_submitting_requires_the_token(daemon: Daemon) -> None:
    answer = daemon.client.post("/v1/tasks", content=sinusoid(0), headers={"Authorization": "Bearer wrong"})
    assert answer.status_code == 401
    assert daemon.status()["rounds"]["ingested"] == 0


@pytest.mark.parametrize("header", [f"Bearer {TOKEN}", f"bearer {TOKEN}", f"Bearer  {TOKEN}"])
def test_the_token_grants_access(daemon: Daemon, header: str) -> None:
    assert daemon.client.get("/v1/status", headers={"Authorization": header}).status_code == 200


@pytest.mark.parametrize("path", ["/", "/healthz", "/docs", "/openapi.json", "/static/app.js"])
def test_pages_without_secrets_need_no_token(daemon: Daemon, path: str) -> None:
    assert daemon.client.get(path, headers={"Authorization": ""}).status_code == 200


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/readyz?of=learning", "/metrics"])
def test_the_probes_need_no_token_at_their_own_address(daemon: Daemon, path: str) -> None:
    address = read_config(daemon.log.with_suffix(".toml")).serve.probes
    assert address is not None

    def ask(path: str) -> int:
        return httpx.get(f"http://{address}{path}", trust_env=False).status_code

    wait_for(f"{path} is 200", lambda: ask(path) == 200)
    at_the_door = daemon.client.get(path, headers={"Authorization": ""})
    assert at_the_door.status_code == (200 if path == "/healthz" else 401)
    for secret in ("/v1/status", "/v1/health", "/v1/weights", "/"):
        assert ask(secret) == 404


def test_the_commands_send_the_token(daemon: Daemon, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = daemon.log.parent
    (folder / "sin-0.safetensors").write_bytes(sinusoid(0))
    untrusted = cli("status", "--url", daemon.url)
    assert untrusted.code == 75
    assert "CERTIFICATE_VERIFY_FAILED" in untrusted.err
    assert "SSL_CERT_FILE" in untrusted.err
    monkeypatch.setenv("SSL_CERT_FILE", str(folder / "cert.pem"))
    for command in (("status",), ("submit", folder / "sin-0.safetensors")):
        ended = cli(*command, "--url", daemon.url)
        assert ended.code == 78
        assert "token" in ended.err
        assert "--token-file" in ended.err
    with_token = ("--url", daemon.url, "--token-file", folder / "token")
    assert cli("submit", folder / "sin-0.safetensors", *with_token).code == 0
    assert cli("status", *with_token).code == 0
    assert cli("status", "--url", daemon.url, "--token-file", folder / "none").code == 78
