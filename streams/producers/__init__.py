"""Bring tasks to a daemon, or to a broker or folder that one reads from; one file for each kind of target.

``open_producer(url)`` gives the producer for an address; ``submit`` and ``connect`` are those of a daemon's HTTP API.
"""

from streams.producers.errors import RETRY_SECONDS, SubmitError
from streams.producers.http import RETRY_STATUSES, connect, submit
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
