"""How sources and producers connect to Redis."""

from typing import Any
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from streams.login import Login, make_tls_context, read_secret

AUTH_ERRORS = (redis.AuthenticationError, redis.exceptions.NoPermissionError)
"""What Redis answers to who may not do what was asked."""


def connect(url: str, login: Login, seconds: float) -> redis.Redis:
    """Return a client that connects when it is first used, and never tries again by itself.

    Args:
        url: redis:// or, for TLS, rediss://.
        login: the files are read now.
        seconds: how long Redis may take to answer.

    Raises:
        ValueError: if the address is none, or a file does not hold what it is for.
        OSError: if a file cannot be read.
    """
    options: dict[str, Any] = {}
    if login.password_file is not None:
        options["password"] = read_secret(login.password_file)
    if make_tls_context(login) is not None:
        if urlsplit(url).scheme != "rediss":
            raise ValueError("ca_file and certificate_file are for TLS: begin the url with rediss://")
        files = {"ca_certs": login.ca_file, "certfile": login.certificate_file}
        files["keyfile"] = login.key_file or login.certificate_file
        options |= {f"ssl_{name}": file for name, file in files.items() if file is not None}
    return redis.Redis.from_url(
        url,
        protocol=2,
        retry=Retry(NoBackoff(), 0),
        socket_timeout=seconds,
        socket_connect_timeout=seconds,
        socket_keepalive=True,
        **options,
    )


def redact_url(url: str) -> str:
    """Return an address as it may be told to anybody."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname or ''}:{parts.port or 6379}"
