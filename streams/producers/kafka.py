"""Send tasks to a Kafka topic."""

from collections import deque

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from streams.brokers.kafka import check_brokers, find_auth_error, make_client, read_login
from streams.brokers.login import KafkaLogin
from streams.producers.errors import UNREACHABLE, RetryLater, SubmitError, check_task_id, retry

TIMEOUT_SECONDS = 20.0
TRANSIENT_ERRORS = (
    KafkaError._MSG_TIMED_OUT,
    KafkaError._TRANSPORT,
    KafkaError._ALL_BROKERS_DOWN,
    KafkaError._TIMED_OUT,
)
"""Errors that are not about the task or the topic, so that a later attempt may succeed."""


class KafkaProducer:
    """A ``Producer`` of messages whose header ``id`` and key are the task's id; the key decides the partition."""

    def __init__(self, brokers: str, topic: str, login: KafkaLogin, retry_seconds: float) -> None:
        """Create a client for ``brokers``, host:port or several separated by commas; raises as ``read_login`` does."""
        check_brokers(brokers)
        self._where, self._topic, self._retry_seconds = f"kafka://{brokers}", topic, retry_seconds
        self._errors: deque[KafkaError] = deque(maxlen=32)
        self._producer = make_client(
            Producer,
            {
                **read_login(login),
                "bootstrap.servers": brokers,
                "acks": "all",
                "linger.ms": 0,
                "message.max.bytes": 1_000_000_000,  # the broker's own limit decides
                "message.timeout.ms": round(1000 * min(TIMEOUT_SECONDS, max(retry_seconds, 1.0))),
                "log_level": 2,
                "error_cb": self._errors.append,
            },
        )

    def send(self, id: str, body: bytes) -> None:
        """Write a message and wait until all in-sync replicas have it."""
        check_task_id(id)
        retry(self._retry_seconds, lambda: self._produce(id, body))

    def _produce(self, id: str, body: bytes) -> None:
        reports: list[KafkaError | None] = []
        self._errors.clear()

        def note(error: KafkaError | None, message: Message) -> None:
            reports.append(error)

        try:
            self._producer.produce(self._topic, body, key=id, headers=[("id", id.encode())], on_delivery=note)
            while not reports:
                self._producer.poll(0.1)
                if (auth_error := find_auth_error(self._errors)) is not None:
                    self._producer.purge()
                    raise KafkaException(auth_error)
            error = reports[0]
        except KafkaException as raised:
            error = raised.args[0]
        if error is None:
            return
        detail = f"{self._where}/{self._topic}: {error.str()}"
        if error.code() in TRANSIENT_ERRORS or error.retriable():
            raise RetryLater(None, UNREACHABLE, detail)
        large = error.code() == KafkaError.MSG_SIZE_TOO_LARGE
        raise SubmitError(None, "too_large" if large else "refused", detail)

    def close(self) -> None:
        """Disconnect; no message is in flight, because ``send`` waits."""
        self._producer.flush(0)
