"""Send tasks to a daemon, or to a broker or folder that a daemon reads; one file for each kind of target.

``open_producer(url)`` returns the producer for an address. ``submit`` and ``connect`` use a daemon's HTTP API directly.
"""

from streams.client.protocol import RETRY_STATUSES
from streams.producers.errors import RETRY_SECONDS, SubmitError
from streams.producers.http import connect, submit
from streams.producers.targets import SCHEMES, Producer, open_producer, split_address

__all__ = [
    "RETRY_SECONDS",
    "RETRY_STATUSES",
    "SCHEMES",
    "Producer",
    "SubmitError",
    "connect",
    "open_producer",
    "split_address",
    "submit",
]
