"""Keep web pages of other origins out: check a request's Host, its Origin and the media types that it names.

A page can make a browser on the same machine send requests to 127.0.0.1. By DNS rebinding, a name of its own leads
there, and the browser then lets the page read the answers.
"""

import ipaddress
import re
from typing import NamedTuple

from starlette.datastructures import Headers
from starlette.types import Scope

from deploy.config.config import ServeSettings
from deploy.exits import ConfigError
from streams.formats.safetensors_header import is_json
from streams.types import Rejected

TENSOR_TYPES = ("application/vnd.safetensors", "application/octet-stream")
"""Media types of tensors; a page of another origin cannot send them unless a CORS preflight allows it."""

JSON_TYPES = ("application/json",)
"""Media types of JSON; the same holds for them."""

TASK_TYPES = (*TENSOR_TYPES, *JSON_TYPES)
"""Media types of a task, and of a request to adapt."""

LOOPBACK = ("localhost", "127.0.0.1", "::1")
DEFAULT_PORTS = {"http": 80, "https": 443}
HOST = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(?::(?P<port>[0-9]{1,5}))?")


class Host(NamedTuple):
    """A host name in lower case or an IP address, and the port if there is one."""

    name: str
    port: int | None


class Refusal(NamedTuple):
    """The answer to a request that is refused."""

    status: int
    reason: str
    detail: str


def parse_host(text: str) -> Host | None:
    """Return the host and port in ``text``, written as in the header Host; None for anything else."""
    found = HOST.fullmatch(text)
    if found is None:
        return None
    port = None if found["port"] is None else int(found["port"])
    return Host(_normalise(found["v6"] or found["name"]), port)


def _normalise(name: str) -> str:
    """Return a name in lower case without the last dot, and an address as ``ipaddress`` writes it."""
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name.lower().removesuffix(".")
    return str(getattr(address, "ipv4_mapped", None) or address)


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class AllowedHosts:
    """The hosts that requests may name: loopback, the address at which the daemon listens, and ``[serve] hosts``.

    Args:
        settings: ``host`` and ``hosts`` are used.

    Raises:
        ConfigError: if an entry of ``hosts`` is not a host name.
    """

    def __init__(self, settings: ServeSettings) -> None:
        """Parse the entries of ``hosts``."""
        configured = []
        for entry in settings.hosts:
            parsed = parse_host(entry)
            if parsed is None:
                raise ConfigError(
                    f"[serve] hosts contains {entry!r}, which is not a host name: write names only, without scheme "
                    'and path, such as "meta.example.com" or "meta.example.com:8443"'
                )
            configured.append(parsed)
        self._configured = frozenset(configured)
        self._names = frozenset((*LOOPBACK, _normalise(settings.host), *(host.name for host in configured)))

    def refuse(self, scope: Scope) -> Refusal | None:
        """Return why a request is refused; None if it comes from no foreign page and names no foreign host.

        The header Host must name an allowed host: under a rebound name, a page could read every answer. An Origin must
        be the daemon's own. ``Sec-Fetch-Site: cross-site`` is refused unless the user follows a link to the daemon.

        Args:
            scope: of an HTTP request; its ``server`` is the local address of the connection.
        """
        hosts, origins, fetch = [], [], dict[bytes, bytes]()
        for name, value in scope["headers"]:
            if name == b"host":
                hosts.append(value.decode("latin1"))
            elif name == b"origin":
                origins.append(value.decode("latin1"))
            elif name.startswith(b"sec-fetch-"):
                fetch[name] = value
        host = parse_host(hosts[0]) if len(hosts) == 1 else None
        if host is None or not self._is_allowed(host.name, (scope.get("server") or ("",))[0]):
            return self._refuse_host(", ".join(hosts))
        foreign = next((origin for origin in origins if not self._is_own_origin(origin, host)), None)
        if foreign is not None:
            return _refuse_page(f"a page of {foreign!r}")
        if fetch.get(b"sec-fetch-site") == b"cross-site" and not _follows_link(scope["method"], fetch):
            return _refuse_page("a page of another site")
        return None

    def _is_allowed(self, name: str, local_address: str) -> bool:
        return name in self._names or is_loopback(name) or name == _normalise(local_address)

    def _is_own_origin(self, origin: str, host: Host) -> bool:
        """Return whether an origin is the host of the request, or an entry of ``hosts``.

        A proxy may replace the header Host, so that the origin differs from it.
        """
        scheme, separator, rest = origin.partition("://")
        default, found = DEFAULT_PORTS.get(scheme), parse_host(rest)
        if not separator or default is None or found is None:
            return False  # "null", extensions, files
        own = [host, *self._configured]
        return any((found.name, found.port or default) == (name, port or default) for name, port in own)

    def _refuse_host(self, host: str) -> Refusal:
        names = ", ".join(sorted(self._names))
        detail = (
            f"the header Host names {host[:200]!r}, and this daemon answers only to {names}: use one of these in the "
            "address, or add the name to [serve] hosts"
        )
        return Refusal(421, "unknown_host", detail)


def _refuse_page(who: str) -> Refusal:
    detail = (
        f"{who} may not use this daemon: only its own pages and programs may; if the page is the daemon's own, behind "
        "a proxy, add the proxy's host name to [serve] hosts"
    )
    return Refusal(403, "foreign_origin", detail)


def _follows_link(method: str, fetch: dict[bytes, bytes]) -> bool:
    """Return whether the user opens the address in a tab; the page with the link cannot read the answer."""
    destination = (fetch.get(b"sec-fetch-mode"), fetch.get(b"sec-fetch-dest"))
    return method in ("GET", "HEAD") and destination == (b"navigate", b"document")


def refuse_media_type(scope: Scope, accepted: tuple[str, ...]) -> Refusal | None:
    """Return why the declared media type of a request is refused; None if it is one of ``accepted``.

    A page of another origin can send a body as text, as a form, or without a media type. None of these is accepted
    anywhere, also where the body is not read.
    """
    declared = [value.decode("latin1") for name, value in scope["headers"] if name == b"content-type"]
    kinds = [kind.partition(";")[0].strip().lower() for kind in declared]
    if len(kinds) == 1 and kinds[0] in accepted:
        return None
    was = f"is declared as {', '.join(declared)[:200]!r}" if declared else "has no media type"
    if accepted == TASK_TYPES:
        tensors = " or ".join(f"`Content-Type: {kind}`" for kind in TENSOR_TYPES)
        wanted = (
            f"JSON with the header `Content-Type: {JSON_TYPES[0]}`, or tensors in safetensors format with {tensors}"
        )
    else:
        wanted = f"it with the header `Content-Type: {accepted[0]}`"
    detail = f"the body {was}: send {wanted} (curl: -H 'Content-Type: {JSON_TYPES[0]}'); see /docs"
    return Refusal(415, "wrong_media_type", detail)


def check_declared_type(headers: Headers, body: bytes) -> None:
    """Check that a body declared as JSON is JSON and that no other one is; its declared type is one of ``TASK_TYPES``.

    Raises:
        Rejected: with the reason "unreadable".
    """
    declared = headers["content-type"].partition(";")[0].strip().lower() in JSON_TYPES
    if declared == is_json(body):
        return
    if declared:
        detail = (
            "the body is declared as `application/json`, and does not begin with '{': send an object of nested lists, "
            f'such as {{"support_x": [[0.5]], ...}}, or safetensors with the header `Content-Type: {TENSOR_TYPES[0]}`'
        )
    else:
        detail = (
            f"the body cannot be read as safetensors: it begins with the text {body[:20].decode('latin1')!r}, as JSON "
            "or CSV does; send JSON with the header `Content-Type: application/json` (curl: -H 'Content-Type: "
            "application/json'); see /docs"
        )
    raise Rejected("unreadable", detail)


def wants_json(headers: Headers, sent_json: bool) -> bool:
    """Return whether to answer in JSON: if Accept names it, or names neither format and the request was JSON."""
    accepted = ", ".join(headers.getlist("accept")).lower()
    names_json, names_tensors = (any(kind in accepted for kind in kinds) for kinds in (JSON_TYPES, TENSOR_TYPES))
    return sent_json if names_json == names_tensors else names_json
