"""Bring tasks to a Kafka topic."""

from collections import deque

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from streams.kafka_connection import find_refusal, make_client, read_login
from streams.login import KafkaLogin
from streams.producer.errors import UNREACHABLE, SubmitError, TryLater, check_name, try_again

TIMEOUT_SECONDS = 20.0
PASSING = (KafkaError._MSG_TIMED_OUT, KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError._TIMED_OUT)
"""Errors that say nothing about the task or the topic."""


class KafkaProducer:
    """A ``Producer`` of messages with a header ``id``, the id as their key, too, so that it decides the partition."""

    def __init__(self, brokers: str, topic: str, login: KafkaLogin, patience: float) -> None:
        """Write to a topic of the ``brokers``, host:port or several between commas; raises as ``read_login`` does."""
        self._where, self._topic, self._patience = f"kafka://{brokers}", topic, patience
        self._said: deque[KafkaError] = deque(maxlen=32)
        self._producer = make_client(
            Producer,
            {
                **read_login(login),
                "bootstrap.servers": brokers,
                "acks": "all",
                "linger.ms": 0,
                "message.max.bytes": 1_000_000_000,  # the broker's own limit decides
                "message.timeout.ms": round(1000 * min(TIMEOUT_SECONDS, max(patience, 1.0))),
                "log_level": 2,
                "error_cb": self._said.append,
            },
        )

    def send(self, id: str, body: bytes) -> None:
        """Write a message and wait until all replicas in sync have it."""
        check_name(id)
        try_again(self._patience, lambda: self._produce(id, body))

    def _produce(self, id: str, body: bytes) -> None:
        reports: list[KafkaError | None] = []
        self._said.clear()

        def note(error: KafkaError | None, message: Message) -> None:
            reports.append(error)

        try:
            self._producer.produce(self._topic, body, key=id, headers=[("id", id.encode())], on_delivery=note)
            while not reports:
                self._producer.poll(0.1)
                if (refusal := find_refusal(self._said)) is not None:
                    self._producer.purge()
                    raise KafkaException(refusal)
            error = reports[0]
        except KafkaException as raised:
            error = raised.args[0]
        if error is None:
            return
        detail = f"{self._where}/{self._topic}: {error.str()}"
        if error.code() in PASSING or error.retriable():
            raise TryLater(None, UNREACHABLE, detail)
        large = error.code() == KafkaError.MSG_SIZE_TOO_LARGE
        raise SubmitError(None, "too_large" if large else "refused", detail)

    def close(self) -> None:
        """Let go of the brokers; nothing is under way any more."""
        self._producer.flush(0)
