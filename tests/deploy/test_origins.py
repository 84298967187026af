"""The daemon answers to its own names and its own pages only, and takes no body that a foreign page can send."""

import http.client
from collections.abc import Iterable
from typing import Any

import httpx
import pytest

from deploy.config.config import ServeSettings
from deploy.exits import ConfigError
from deploy.server.listener import check_exposure
from deploy.server.origins import AllowedHosts
from tests.deploy.conftest import Cli
from tests.support.daemon import Daemon, sinusoid, write_request

TENSORS = "application/octet-stream"


def status_of(daemon: Daemon, method: str, path: str, headers: Iterable[tuple[str, str]]) -> tuple[int, dict[str, str]]:
    """Return the status and the headers of an answer to exactly these headers, repeated ones included."""
    url = httpx.URL(daemon.url)
    connection = http.client.HTTPConnection(url.host, url.port or 80, timeout=60)
    try:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in headers:
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        answer.read()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}
    finally:
        connection.close()


FOREIGN_HOSTS = ["rebound.example", "rebound.example:{port}", "127.0.0.1.rebound.example", "localhost.rebound.example"]
FOREIGN_HOSTS += ["10.0.0.1", "", "localhost@rebound.example", "localhost,rebound.example", "[::2]"]


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
@pytest.mark.parametrize(
    "path", ["/", "/v1/weights", "/v1/status", "/metrics", "/healthz", "/readyz", "/static/app.js"]
)
def test_a_foreign_host_name_is_refused_everywhere(daemon: Daemon, path: str, host: str) -> None:
    answer = daemon.client.get(path, headers={"Host": host.format(port=httpx.URL(daemon.url).port)})
    assert (answer.status_code, answer.json()["reason"]) == (421, "unknown_host")
    assert "answers only to 127.0.0.1, ::1, localhost" in answer.json()["detail"]
    assert "[serve] hosts" in answer.json()["detail"]


def test_a_request_with_no_host_or_with_two_is_refused(daemon: Daemon) -> None:
    assert status_of(daemon, "GET", "/v1/status", [])[0] == 421
    assert status_of(daemon, "GET", "/v1/status", [("Host", "localhost"), ("Host", "rebound.example")])[0] == 421


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "localhost.", "127.0.0.1:9999", "127.0.0.2", "[::1]:80"])
def test_loopback_names_are_answered_at_any_port(daemon: Daemon, host: str) -> None:
    """A tunnel of SSH, for example, has a port of its own."""
    assert daemon.client.get("/v1/status", headers={"Host": host}).status_code == 200


def test_configured_names_and_the_local_address_are_answered() -> None:
    allowed = AllowedHosts(ServeSettings(host="0.0.0.0", hosts=("Meta.example.com", "other.example.com:8443")))

    def refused(host: str, origin: str | None = None, local: str = "192.0.2.7") -> int | None:
        headers = [(b"host", host.encode())] + ([(b"origin", origin.encode())] if origin else [])
        refusal = allowed.refuse({"method": "GET", "headers": headers, "server": (local, 8780)})
        return refusal and refusal.status

    for host in ("meta.example.com", "META.example.com:443", "other.example.com", "192.0.2.7:8780", "0.0.0.0:8780"):
        assert refused(host) is None, host
    assert refused("[2001:db8::7]:8780", local="2001:0db8:0::7") is None
    assert refused("192.0.2.7", local="::ffff:192.0.2.7") is None
    assert refused("192.0.2.8") == 421
    assert refused("not.example.com") == 421
    # Behind a proxy that replaces the header Host.
    assert refused("127.0.0.1:8780", "https://meta.example.com") is None
    assert refused("127.0.0.1:8780", "https://other.example.com:8443") is None
    assert refused("127.0.0.1:8780", "https://other.example.com") == 403
    assert refused("127.0.0.1:8780", "https://meta.example.com:4443") == 403


@pytest.mark.parametrize("name", ["https://meta.example.com", "meta.example.com/", "*", "*.example.com", "", "a b"])
def test_an_entry_of_hosts_that_is_no_name(name: str) -> None:
    with pytest.raises(ConfigError, match=r"\[serve\] hosts contains .*which is not a host name: write names only"):
        check_exposure(ServeSettings(hosts=(name,)))


FOREIGN: dict[str, dict[str, str]] = {
    "another site": {"Origin": "http://page.example"},
    "another port": {"Origin": "http://localhost:1"},
    "a name like ours": {"Origin": "http://localhost.page.example:{port}"},
    "a sandboxed page": {"Origin": "null"},
    "an extension": {"Origin": "chrome-extension://abcdefgh"},
    "no origin": {"Sec-Fetch-Site": "cross-site"},
    "an image": {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"},
    "a frame": {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"},
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_foreign_page_is_refused(daemon: Daemon, case: str) -> None:
    headers = {name: value.format(port=httpx.URL(daemon.url).port) for name, value in FOREIGN[case].items()}
    before = daemon.status()["rounds"]["ingested"]
    answers = [
        daemon.client.post("/v1/tasks", content=sinusoid(0), headers=headers),
        daemon.client.post("/v1/adapt", content=b"x", headers=headers),
        *(daemon.client.get(path, headers=headers) for path in ("/", "/v1/weights", "/v1/status", "/metrics")),
    ]
    assert [(answer.status_code, answer.json()["reason"]) for answer in answers] == [(403, "foreign_origin")] * 6
    assert not [name for name in answers[0].headers if name.startswith("access-control")]
    assert daemon.status()["rounds"]["ingested"] == before


def test_a_form_that_a_foreign_page_submits_is_refused(daemon: Daemon) -> None:
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert daemon.client.post("/v1/tasks", content=sinusoid(0), headers=headers).status_code == 403


def test_a_link_to_the_dashboard_is_followed(daemon: Daemon) -> None:
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert daemon.client.get("/", headers=headers).status_code == 200


def test_the_daemons_own_pages_are_answered(daemon: Daemon) -> None:
    headers = {"Origin": daemon.url, "Sec-Fetch-Site": "same-origin"}
    assert daemon.client.post("/v1/tasks", content=sinusoid(0), headers=headers).status_code in (200, 201)
    tunnel = {"Host": "localhost:9999", "Origin": "http://localhost:9999"}
    assert daemon.client.get("/v1/status", headers=tunnel).status_code == 200
    assert daemon.client.get("/").headers["Cross-Origin-Resource-Policy"] == "same-origin"


@pytest.mark.parametrize("path", ["/v1/tasks", "/v1/adapt", "/v1/status", "/"])
@pytest.mark.parametrize("origin", ["http://page.example", "null"])
def test_a_preflight_gets_no_permission(daemon: Daemon, path: str, origin: str) -> None:
    asked = [("Access-Control-Request-Method", "POST"), ("Access-Control-Request-Headers", "content-type")]
    status, headers = status_of(daemon, "OPTIONS", path, [("Host", "localhost"), ("Origin", origin), *asked])
    assert status == 403
    assert not [name for name in headers if name.startswith("access-control")]


SENDABLE = [
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "text/plain;charset=UTF-8",
]
OTHERS = ["application/x-npz", "text/plain; application/octet-stream", "", "application"]


def post_paths(daemon: Daemon) -> list[str]:
    described: dict[str, Any] = daemon.client.get("/openapi.json").json()["paths"]
    return [path for path, methods in described.items() if "post" in methods]


@pytest.mark.parametrize("media_type", [None, *SENDABLE, *OTHERS])
def test_a_body_must_be_declared_as_tensors(daemon: Daemon, media_type: str | None) -> None:
    """Browsers send text, forms and bodies without a type to other origins without asking."""
    before = daemon.client.get("/metrics").text.count("wrong_media_type")
    with httpx.Client(base_url=daemon.url, trust_env=False) as client:
        for path in post_paths(daemon):
            headers = {} if media_type is None else {"Content-Type": media_type}
            answer = client.post(path, content=sinusoid(0), headers=headers)
            assert (answer.status_code, answer.json()["reason"]) == (415, "wrong_media_type"), path
            accepted = answer.headers["Accept"].split(", ")
            assert set(accepted) <= {"application/vnd.safetensors", TENSORS, "application/json"}
            assert all(f"`Content-Type: {kind}`" in answer.json()["detail"] for kind in accepted)
            if media_type:
                assert repr(media_type) in answer.json()["detail"]
    assert daemon.client.get("/metrics").text.count("wrong_media_type") == before, "a page must not fill dead letters"


@pytest.mark.parametrize("path", ["/v1/tasks", "/v1/adapt"])
def test_tensors_declared_as_json_are_refused(daemon: Daemon, path: str) -> None:
    answer = daemon.client.post(path, content=sinusoid(0), headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["reason"]) == (422, "unreadable")
    assert "declared as `application/json`, and does not begin with '{'" in answer.json()["detail"]
    assert "safetensors with the header `Content-Type: application/vnd.safetensors`" in answer.json()["detail"]


def test_two_media_types_are_refused(daemon: Daemon) -> None:
    headers = [
        ("Host", "localhost"),
        ("Content-Length", "0"),
        ("Content-Type", TENSORS),
        ("Content-Type", "text/plain"),
    ]
    assert status_of(daemon, "POST", "/v1/tasks", headers)[0] == 415


@pytest.mark.parametrize("media_type", ["application/vnd.safetensors", "Application/Octet-Stream", f"{TENSORS}; a=b"])
def test_both_types_of_tensors_are_accepted(daemon: Daemon, media_type: str) -> None:
    answer = daemon.client.post("/v1/tasks", content=sinusoid(0), headers={"Content-Type": media_type})
    assert answer.status_code in (200, 201)


@pytest.mark.parametrize("text", [b'{"support_x": [[1.0]]}', b'{\n  "x": 1\n}', b"x,y\n1,2\n3,4"])
def test_text_declared_as_tensors_is_named(daemon: Daemon, text: bytes) -> None:
    answer = daemon.post(text)
    assert (answer.status_code, answer.json()["reason"]) == (422, "unreadable")
    assert f"begins with the text {text[:20].decode()!r}, as JSON or CSV does" in answer.json()["detail"]
    if text.startswith(b"{"):
        assert "send JSON with the header `Content-Type: application/json`" in answer.json()["detail"]


@pytest.mark.parametrize("path", ["/v1/tasks", "/v1/adapt"])
def test_json_declared_as_tensors_is_told_its_media_type(daemon: Daemon, path: str) -> None:
    for text in ('{"naïve": 1}', '\n {"a":1}', "{}"):
        answer = daemon.client.post(path, content=text.encode())
        assert (answer.status_code, answer.json()["reason"]) == (422, "unreadable")
        assert "curl: -H 'Content-Type: application/json'" in answer.json()["detail"]
        assert "claims" not in answer.json()["detail"]


def test_the_commands_send_accepted_types(daemon: Daemon, cli: Cli) -> None:
    folder = daemon.log.parent
    (folder / "typed.safetensors").write_bytes(sinusoid(7))
    assert cli("submit", folder / "typed.safetensors", "--url", daemon.url).code == 0
    support, query = write_request(folder, 7)
    ended = cli("adapt", "--support", support, "--query", query, "--url", daemon.url)
    assert (ended.code, ended.err) == (0, "")
