"""Send tasks to a NATS JetStream stream."""

from contextlib import suppress

import nats.errors
from nats.js.client import JetStreamContext
from nats.js.errors import NoStreamResponseError, NotFoundError

from streams.brokers.login import LoginRefused, NatsLogin, hide_secrets
from streams.brokers.nats import Connection, EventLoopThread, check_servers, read_login
from streams.producers.errors import UNREACHABLE, RetryLater, SubmitError, check_task_id, retry

TIMEOUT_SECONDS = 10.0


class NatsProducer:
    """A ``Producer`` of messages with a header ``id``.

    The server acknowledges a message once it is on disk, if it runs with ``sync_interval: always``.
    """

    def __init__(self, server: str, target: str, login: NatsLogin, retry_seconds: float) -> None:
        """Take the subject ``target``, or the name of a stream with one subject; raises as ``read_login`` does."""
        check_servers(server, login)
        read_login(login)
        self._address, self._server = server, hide_secrets(server)
        self._target, self._login, self._retry_seconds = target, login, retry_seconds
        self._loop = EventLoopThread("producer-nats")
        self._connection: Connection | None = None
        self._subject = ""

    def send(self, id: str, body: bytes) -> None:
        """Publish a message; publish it again if the acknowledgement is lost."""
        check_task_id(id)
        retry(self._retry_seconds, lambda: self._publish(id, body))

    def _publish(self, id: str, body: bytes) -> None:
        try:
            self._loop.run(self._publish_once(id, body), 3 * TIMEOUT_SECONDS)
        except nats.errors.MaxPayloadError as error:
            raise SubmitError(None, "too_large", f"{self._server} does not accept {len(body)} bytes") from error
        except LoginRefused as error:
            raise SubmitError(None, "refused", str(error)) from error
        except (NoStreamResponseError, NotFoundError, ValueError) as error:
            raise SubmitError(None, "refused", f"{self._server}/{self._target}: {error}") from error
        except (nats.errors.Error, OSError, TimeoutError) as error:
            self._disconnect()
            raise RetryLater(None, UNREACHABLE, f"{self._server}: {type(error).__name__}: {error}") from error

    async def _publish_once(self, id: str, body: bytes) -> None:
        if self._connection is None:
            connection = Connection()
            await connection.open(self._address, TIMEOUT_SECONDS, self._login)
            try:
                self._subject = await _find_subject(connection.client.jetstream(timeout=TIMEOUT_SECONDS), self._target)
            except BaseException:
                await connection.close()
                raise
            self._connection = connection
        stream = self._connection.client.jetstream(timeout=TIMEOUT_SECONDS)
        await stream.publish(self._subject, body, headers={"id": id})

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(TimeoutError):  # the server need not notice
                self._loop.run(connection.close(), TIMEOUT_SECONDS)

    def close(self) -> None:
        """Close the connection and stop the thread."""
        self._disconnect()
        self._loop.close()


async def _find_subject(stream: JetStreamContext, target: str) -> str:
    """Return the subject to publish on, given a subject or the name of a stream with one subject."""
    try:
        subjects = (await stream.stream_info(target)).config.subjects or []
    except (NotFoundError, ValueError):  # no stream has that name, or it is not a valid name
        return target
    plain = [subject for subject in subjects if not set(subject) & {"*", ">"}]
    if len(plain) != 1:
        raise ValueError(f"the stream {target} has the subjects {', '.join(subjects)}: name the one to publish on")
    return plain[0]
