"""How one logs in at a broker: settings that name files, for a secret stands in a file of its own and nowhere else."""

import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar
from urllib.parse import parse_qs, urlsplit


@contextmanager
def translate_import_errors(extra: str) -> Iterator[None]:
    """Say how to install what cannot be imported; raises ``ImportError``."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(f"{error}; install it: pip install 'online-meta[{extra}]'") from error


PREFETCH_BYTES = 16 * 1024 * 1024
"""How many bytes of tasks a source asks its broker for at once, where it can know beforehand."""


def next_fetch_count(max_count: int, sizes: list[int]) -> int:
    """Return how many entries to ask for next, given the sizes in bytes of those that came last, 1 to ``max_count``."""
    return max(1, min(max_count, PREFETCH_BYTES // max([*sizes, 1])))


@dataclass(frozen=True)
class Login:
    """What every broker but Kafka's is told.

    Attributes:
        password_file: a file that holds the password.
        ca_file: certificates, PEM, of those who may vouch for the broker; left out: those that the machine trusts.
        certificate_file: a certificate, PEM, to be shown to the broker.
        key_file: the certificate's private key, PEM; left out: it stands in ``certificate_file``.
    """

    password_file: str | None = None
    ca_file: str | None = None
    certificate_file: str | None = None
    key_file: str | None = None


@dataclass(frozen=True)
class NatsLogin(Login):
    """What a NATS server is told.

    Attributes:
        user: whose password is in ``password_file``.
        token_file: a file that holds a token, in place of user and password.
        credentials_file: a user's JWT and seed, as ``nsc`` writes them, in place of both.
    """

    user: str | None = None
    token_file: str | None = None
    credentials_file: str | None = None


@dataclass(frozen=True)
class KafkaLogin:
    """What a Kafka broker is told.

    Attributes:
        properties_file: a file of "name = value" lines, further settings of librdkafka: how to log in, for example.
    """

    properties_file: str | None = None


class LoginRefused(ValueError):
    """The broker does not let us in, or its certificate is not believed: it will not get better by waiting."""


LoginType = TypeVar("LoginType", Login, NatsLogin, KafkaLogin)


def split_login(kind: type[LoginType], query: dict[str, str]) -> tuple[LoginType, dict[str, str]]:
    """Return the login that the query of an address describes, and what else stands there."""
    names = {field.name for field in fields(kind)}
    return kind(**{name: query[name] for name in query if name in names}), {
        name: query[name] for name in query if name not in names
    }


def make_tls_context(login: Login) -> ssl.SSLContext | None:
    """Return how TLS is spoken, None where nothing is said of it.

    Raises:
        OSError: if a file cannot be read; it is named.
        ValueError: if one does not hold what it is for.
    """
    if login.key_file is not None and login.certificate_file is None:
        raise ValueError("key_file is the key of a certificate: name that, too, in certificate_file")
    if login.ca_file is None and login.certificate_file is None:
        return None
    for file in (login.ca_file, login.certificate_file, login.key_file):
        if file is not None:
            Path(file).read_bytes()  # what the library raises does not name the file
    try:
        context = ssl.create_default_context(cafile=login.ca_file)
    except ssl.SSLError as error:
        raise ValueError(f"ca_file: {login.ca_file} holds no certificates in PEM ({error.reason})") from error
    if login.certificate_file is not None:
        try:
            context.load_cert_chain(login.certificate_file, login.key_file)
        except ssl.SSLError as error:
            named = " and ".join(filter(None, (login.certificate_file, login.key_file)))
            raise ValueError(f"certificate_file: {named} hold no certificate and its key ({error.reason})") from error
    return context


def refuse_secrets(setting: str, url: str, advice: str, *, users: bool = True) -> None:
    """Raise ``ValueError`` if a secret stands in an address of a configuration, which is written into reports.

    Args:
        setting: what the address is called.
        url: the address, or one of several.
        advice: where the secret should stand.
        users: whether a user may be named without a password.
    """
    parts = urlsplit(url)
    secret = parts.password or (not users and parts.username) or "password" in parse_qs(parts.query)
    if secret:
        raise ValueError(
            f"{setting} holds a secret, and what stands in a configuration is written into the run's report: {advice}"
        )


@contextmanager
def translate_login_errors(address: str, *auth_errors: type[Exception]) -> Iterator[None]:
    """Say what is wrong when a broker is not let believe us, or is not believed; raises ``LoginRefused``.

    Args:
        address: the broker's address, without secrets.
        auth_errors: what the client library raises when a broker does not let one in.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, auth_errors):
            raise LoginRefused(f"{address} refuses the login: {error}") from error
        found: BaseException | None = error
        while found is not None and not isinstance(found, ssl.SSLCertVerificationError):
            found = found.__cause__ or found.__context__
        if found is None:
            raise
        raise LoginRefused(
            f"{address} shows a certificate that is not believed: {found.verify_message}; "
            "ca_file names the certificates of those who may vouch for it"
        ) from error


def hide_secrets(address: str) -> str:
    """Return an address, or several, without the user and password that may stand in it."""
    return re.sub(r"//[^/@,]*@", "//", address)


def read_secret(file: str) -> str:
    """Return what a file of one line holds; raises ``OSError`` or ``ValueError`` naming it."""
    secret = Path(file).read_text(encoding="utf-8").strip()
    if not secret or "\n" in secret:
        raise ValueError(f"{file} must hold one line, and nothing else")
    return secret


def read_properties(file: str) -> dict[str, str]:
    """Return the settings in a file of "name = value" lines; # begins a comment line.

    Raises:
        OSError: if it cannot be read.
        ValueError: naming the line that is no setting.
    """
    properties = {}
    for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), 1):
        name, equals, value = line.partition("=")
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if not equals or not name.strip():
            raise ValueError(
                f"{file}, line {number}: write it as name = value, for example security.protocol = SASL_SSL"
            )
        properties[name.strip()] = value.strip()
    return properties
