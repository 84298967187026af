"""Log in to a broker: settings name files, because each secret must be in its own file and nowhere else."""

import re
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar
from urllib.parse import parse_qs, parse_qsl, urlsplit

from streams.private_files import check_private


@contextmanager
def translate_import_errors(extra: str) -> Iterator[None]:
    """Translate a failed import into an ``ImportError`` that says how to install the package."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(f"{error}; install it: pip install 'online-meta[{extra}]'") from error


PREFETCH_BYTES = 16 * 1024 * 1024
"""How many bytes of tasks a source requests from its broker at once, as far as their size is known."""


def next_fetch_count(max_count: int, sizes: list[int]) -> int:
    """Return how many entries to request next, 1 .. ``max_count``, given the sizes in bytes of the last entries."""
    return max(1, min(max_count, PREFETCH_BYTES // max([*sizes, 1])))


@dataclass(frozen=True)
class Login:
    """The login to any broker but Kafka.

    Attributes:
        password_file: a file with the password.
        ca_file: the certificates (PEM) of trusted authorities; by default, those that the machine trusts.
        certificate_file: the client certificate (PEM).
        key_file: the private key (PEM) of the certificate; by default it is in ``certificate_file``.
    """

    password_file: str | None = None
    ca_file: str | None = None
    certificate_file: str | None = None
    key_file: str | None = None


@dataclass(frozen=True)
class NatsLogin(Login):
    """The login to a NATS server.

    Attributes:
        user: the user whose password is in ``password_file``.
        token_file: a file with a token, instead of a user and a password.
        credentials_file: a file with a user's JWT and seed, as ``nsc`` writes it, instead of both.
    """

    user: str | None = None
    token_file: str | None = None
    credentials_file: str | None = None


@dataclass(frozen=True)
class KafkaLogin:
    """The login to a Kafka broker.

    Attributes:
        properties_file: a file of "name = value" lines with more settings of librdkafka, such as the login.
    """

    properties_file: str | None = None


class LoginRefused(ValueError):
    """The broker refuses the login, or its certificate is not trusted; waiting does not help."""


LoginType = TypeVar("LoginType", Login, NatsLogin, KafkaLogin)


def read_query(query: str, known: Sequence[str]) -> dict[str, str]:
    """Return the options in the query of an address by name.

    A client library would take any option that it knows, instead of what the settings say: another password, no
    verification of certificates, other timeouts. Therefore only the ``known`` ones are accepted.

    Raises:
        ValueError: if an option is not among ``known``, has no value, or occurs twice.
    """
    found: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in known:
            options = f"the options are {', '.join(known)}" if known else "it takes no options"
            raise ValueError(f"unknown option {name[:80]} in the address; {options}")
        if not value or name in found:
            raise ValueError(f"the option {name} in the address has {'no value' if not value else 'several values'}")
        found[name] = value
    return found


def split_login(kind: type[LoginType], query: str, *others: str) -> tuple[LoginType, dict[str, str]]:
    """Split the query of an address into a login of the given kind and the parameters ``others``.

    Raises:
        ValueError: as ``read_query`` does.
    """
    names: list[str] = [field.name for field in fields(kind)]
    found = read_query(query, [*others, *names])
    return kind(**{name: found[name] for name in names if name in found}), {
        name: found[name] for name in others if name in found
    }


def check_address(setting: str, address: str, schemes: Sequence[str], path: str, options: Sequence[str] = ()) -> None:
    """Raise ``ValueError`` unless an address consists of a scheme, a host and what its client does not set itself.

    Args:
        setting: the name of the setting, for the message.
        address: one address; without "://", the first of ``schemes`` is assumed.
        schemes: the schemes that the client speaks.
        path: a regular expression for its path.
        options: the options that its query may have.
    """
    try:
        parts = urlsplit(address if "://" in address else f"{schemes[0]}://{address}")
        port = parts.port
    except ValueError as error:
        raise ValueError(f"{setting}: {hide_secrets(address)!r} is not an address: {error}") from error
    shown = f"{setting}: {parts.scheme}://{parts.hostname or ''}"
    if parts.scheme not in schemes:
        raise ValueError(f"{shown}: the schemes are {', '.join(f'{scheme}://' for scheme in schemes)}")
    if not parts.hostname or port == 0:
        raise ValueError(f"{shown} names no host and port")
    try:
        read_query(parts.query, options)
    except ValueError as error:
        raise ValueError(f"{shown}: {error}; everything else is a setting of its own") from error
    if not re.fullmatch(path, parts.path) or parts.fragment:
        raise ValueError(f"{shown}: {f'{parts.path}#{parts.fragment}'.rstrip('#')[:80]!r} after the host is not read")


def make_tls_context(login: Login) -> ssl.SSLContext | None:
    """Return the TLS context for a login, None if the login sets nothing about TLS.

    Raises:
        OSError: if a file cannot be read; the message names the file.
        ValueError: if a file does not contain the expected certificates or key, or others can read the key.
    """
    if login.key_file is not None and login.certificate_file is None:
        raise ValueError("key_file is the key of a certificate: set certificate_file, too")
    if login.ca_file is None and login.certificate_file is None:
        return None
    for file in (login.ca_file, login.certificate_file, login.key_file):
        if file is not None:
            Path(file).read_bytes()  # the errors of the library do not name the file
    if login.certificate_file is not None:
        check_private(login.key_file or login.certificate_file)
    try:
        context = ssl.create_default_context(cafile=login.ca_file)
    except ssl.SSLError as error:
        raise ValueError(f"ca_file: {login.ca_file} contains no PEM certificates ({error.reason})") from error
    if login.certificate_file is not None:
        try:
            context.load_cert_chain(login.certificate_file, login.key_file)
        except ssl.SSLError as error:
            named = " and ".join(filter(None, (login.certificate_file, login.key_file)))
            raise ValueError(f"certificate_file: no certificate and key in {named} ({error.reason})") from error
    return context


def refuse_secrets(setting: str, url: str, advice: str, *, users: bool = True) -> None:
    """Raise ``ValueError`` if an address in a configuration contains a secret, because reports contain the address.

    Args:
        setting: the name of the setting.
        url: the address, or one of several.
        advice: where to put the secret instead.
        users: whether the address may contain a user without a password.
    """
    parts = urlsplit(url)
    secret = parts.password or (not users and parts.username) or "password" in parse_qs(parts.query)
    if secret:
        raise ValueError(f"{setting} contains a secret, and the run's report includes the configuration: {advice}")


@contextmanager
def translate_login_errors(address: str, *auth_errors: type[Exception]) -> Iterator[None]:
    """Translate a refused login or an untrusted certificate into ``LoginRefused`` with an explanation.

    Args:
        address: the broker's address, without secrets.
        auth_errors: the exceptions that the client library raises when a broker refuses the login.
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
            f"{address} presents a certificate that is not trusted: {found.verify_message}; "
            "set ca_file to the certificates of its authority"
        ) from error


def hide_secrets(address: str) -> str:
    """Return an address, or several, without user and password."""
    return re.sub(r"//[^/@,]*@", "//", address)


def read_secret(file: str) -> str:
    """Read the secret in a file of one line that only this user can read.

    Raises ``OSError`` or ``ValueError`` that names the file.
    """
    check_private(file)
    secret = Path(file).read_text(encoding="utf-8").strip()
    if not secret or "\n" in secret:
        raise ValueError(f"{file} must contain exactly one line")
    return secret


def read_properties(file: str) -> dict[str, str]:
    """Read the settings in a file of "name = value" lines; a line that begins with # is a comment.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if a line is not a setting; the message names the line. Also if others can read the file or the
            private key that it names.
    """
    check_private(file)
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
    if key := properties.get("ssl.key.location"):
        check_private(key)
    return properties
