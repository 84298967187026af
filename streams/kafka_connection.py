"""What sources and producers of Kafka share."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from confluent_kafka import KafkaError, KafkaException

from streams.login import KafkaLogin, read_properties

AUTH_ERRORS = (
    KafkaError._AUTHENTICATION,
    KafkaError._SSL,
    KafkaError.SASL_AUTHENTICATION_FAILED,
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
)
"""Errors of who may not come in, or does not believe the broker."""

Client = TypeVar("Client")


def read_login(login: KafkaLogin) -> dict[str, str]:
    """Return the settings of librdkafka that a login names.

    Raises:
        OSError: if the file cannot be read.
        ValueError: naming the line that is no setting.
    """
    return {} if login.properties_file is None else read_properties(login.properties_file)


def make_client(make: Callable[[dict[str, Any]], Client], settings: Mapping[str, Any]) -> Client:
    """Return a client of librdkafka; raises ``ValueError`` for a setting that it does not have."""
    try:
        return make(dict(settings))
    except KafkaException as error:
        raise ValueError(f"properties_file: {error.args[0].str()}") from error


def find_auth_error(errors: Sequence[KafkaError]) -> KafkaError | None:
    """Return the last of the errors that says that a login is refused."""
    return next((error for error in reversed(errors) if error.code() in AUTH_ERRORS), None)
