"""The token that a daemon asks for: the contents of a file, so that it is in no process list and no configuration."""

from pathlib import Path

from deploy.exits import ConfigError


def read_token(file: Path | None, option: str) -> str | None:
    """Return the token in ``file``; None without a file.

    Raises ``ConfigError`` that names the ``option`` when there is none that an HTTP header could carry.
    """
    if file is None:
        return None
    try:
        token = file.read_text(encoding="ascii").strip()
    except OSError as error:
        raise ConfigError(f"{option} {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{option} {file} holds no token: it must be ASCII letters, digits or signs") from error
    if not token:
        raise ConfigError(f"{option} {file} is empty: put a long random token in it")
    if not token.isprintable() or " " in token:
        raise ConfigError(f"{option} {file} holds more than a token: it must be one word on one line")
    return token
