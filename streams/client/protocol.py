"""Write requests to a daemon and read its answers, without sending them: what every client of the HTTP API shares."""

import email.utils
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable
from urllib.parse import quote, urlsplit

import httpx

from streams.entities import find_entity
from streams.types import Receipt

RETRY_STATUSES = (408, 429, 500, 502, 503, 504, 507)
"""The HTTP statuses that are not about the request, so that a later attempt may succeed."""

JSON_TYPE = "application/json"
TENSORS = "application/octet-stream"

Result = TypeVar("Result")

Lists = list[Any]
"""Nested lists of numbers."""


class DaemonError(Exception):
    """A daemon did not do what it was asked.

    Attributes:
        status: the HTTP status; None if there was no answer.
        reason: the reason that the daemon gives, a short slug; otherwise "unreachable", "bad_request" or
            "unexpected_answer".
        detail: a sentence.
        retry_after: the seconds after which the daemon asks to try again; 0 if it does not.
    """

    def __init__(self, status: int | None, reason: str, detail: str, retry_after: float = 0.0) -> None:
        """Store the parts and compose the message."""
        answered = f" (HTTP {status})" if status is not None else ""
        super().__init__(f"{reason}{answered}: {detail}")
        self.status, self.reason, self.detail, self.retry_after = status, reason, detail, retry_after

    @property
    def may_be_repeated(self) -> bool:
        """Return whether a later attempt may succeed."""
        if self.status is None:
            return self.reason == "unreachable"
        return self.status in RETRY_STATUSES and self.reason != "predictions_full"  # Labels make room, time hardly.


class Adaptation(NamedTuple):
    """The answer to a support set.

    Attributes:
        round: the number of rounds that the run had learned.
        predictions: nested lists, one entry for each input; None for what is not finite. The answer of a model with
            several outputs is in ``tensors`` alone.
        labels: the most probable classes; None if there are none.
        tensors: all tensors of the answer by name, with the components of a mixture and the parts that were asked for.
    """

    round: int
    predictions: Lists
    labels: Lists | None
    tensors: dict[str, Lists]


class RoundStatus(NamedTuple):
    """What became of a task: "pending", "learned", "skipped" or "quarantined", its round and its losses."""

    status: str
    round: int
    loss_before: float | None
    loss_after: float | None


class Verdict(NamedTuple):
    """Whether meta-learning pays on a stream.

    Attributes:
        state: "pays", "does_not" or "too_early".
        sentence: the same in words.
        gain: the mean loss of the best answer that does not learn across tasks, minus that of the run's.
        interval: the 95 % interval of the gain; None while there are too few rounds.
        details: everything that the daemon answers.
    """

    state: str
    sentence: str
    gain: float | None
    interval: tuple[float, float] | None
    details: dict[str, Any]


@runtime_checkable
class SupportsToList(Protocol):
    """An array of NumPy or a tensor of torch."""

    def tolist(self) -> Any:
        """Return nested lists."""


@dataclass(frozen=True)
class Call(Generic[Result]):
    """A request, and how its answer is read."""

    method: str
    path: str
    read: Callable[[httpx.Response], Result]
    params: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    content: bytes | None = None

    def arguments(self, url: str, headers: Mapping[str, str]) -> dict[str, Any]:
        """Return the arguments of ``httpx.request`` for a daemon at ``url``."""
        return {
            "method": self.method,
            "url": f"{url}/v1/{self.path}",
            "params": self.params,
            "headers": {"Accept": JSON_TYPE, **headers, **self.headers},
            "content": self.content,
        }


def make_headers(url: str, token: str | None) -> dict[str, str]:
    """Return the headers of all requests; raise ``ValueError`` unless ``url`` is the address of a daemon.

    An address with a user is refused, which httpx would send instead of the token.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is not the address of a daemon, such as http://127.0.0.1:8780")
    if "@" in parts.netloc or parts.query or parts.fragment:
        shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        raise ValueError(
            f"{shown}: the address of a daemon has no user, query or fragment; its token is sent separately"
        )
    return {} if token is None else {"Authorization": f"Bearer {token}"}


def submit_call(task: Mapping[str, Any], id: str | None, safetensors: bool = False) -> Call[Receipt]:
    """Return the call that submits a task; its id makes it safe to repeat."""
    content, media_type = _encode(task, safetensors)
    id = hashlib.sha256(content).hexdigest() if id is None else id
    headers = {"Idempotency-Key": id, "Content-Type": media_type}
    return Call("POST", "tasks", _read_receipt, headers=headers, content=content)


def adapt_call(
    request: Mapping[str, Any],
    safetensors: bool = False,
    parts: Sequence[str] = (),
    levels: Sequence[float] = (),
    samples: int | None = None,
) -> Call[Adaptation]:
    """Return the call that adapts to a support set, and asks for parts of the answer, quantiles and samples."""
    content, media_type = _encode(request, safetensors)
    asked: dict[str, Any] = {"part": [*parts], "level": [*levels], "samples": samples}
    params = {name: value for name, value in asked.items() if value not in ([], None)}
    headers = {"Content-Type": media_type}
    return Call("POST", "adapt", _read_adaptation, params=params, headers=headers, content=content)


def predict_call(entity: str, rows: Sequence[Mapping[str, Any]], keep: bool = False) -> Call[dict[str, Any]]:
    """Return the call that asks for predictions for rows of an entity, and may let the daemon keep them."""
    content = _to_json({"rows": list(rows), **({"keep": True} if keep else {})})
    path = f"entities/{quote(entity, safe='')}/predict"
    return Call("POST", path, _read_object, headers={"Content-Type": JSON_TYPE}, content=content)


def label_call(prediction: str, labels: Any) -> Call[dict[str, Any]]:
    """Return the call that sends the labels of a kept prediction; raises ``ValueError`` if this is no id of one."""
    entity = find_entity(prediction)
    if entity is None:
        raise ValueError(
            f"{prediction!r} is not the id of a kept prediction, such as 'http..shop-7..p0123456789abcdef'"
        )
    content = _to_json({"prediction": prediction, "labels": labels})
    path = f"entities/{quote(entity, safe='')}/observe"
    return Call("POST", path, _read_object, headers={"Content-Type": JSON_TYPE}, content=content)


def task_call(id: str) -> Call[RoundStatus]:
    """Return the call that asks what became of a task."""
    return Call("GET", f"tasks/{quote(id, safe='')}", _read_round_status)


def verdict_call() -> Call[Verdict]:
    """Return the call that asks for the verdict."""
    return Call("GET", "verdict", _read_verdict)


def json_call(*path: str, **params: int | None) -> Call[dict[str, Any]]:
    """Return the call that reads an object at a path below /v1/."""
    given = {name: value for name, value in params.items() if value is not None}
    return Call("GET", "/".join(quote(part, safe="") for part in path), _read_object, params=dict(given))


def read_answer(call: Call[Result], answer: httpx.Response) -> Result:
    """Return the result in an answer; raise ``DaemonError`` if there is none."""
    if not answer.is_success:
        raise read_error(answer)
    try:
        return call.read(answer)
    except (ValueError, KeyError, TypeError) as error:
        detail = f"{answer.url} is not an online-meta daemon: {answer.text[:200]}"
        raise DaemonError(answer.status_code, "unexpected_answer", detail) from error


def read_error(answer: httpx.Response) -> DaemonError:
    """Return the error that an answer reports."""
    try:
        content = answer.json()
        reason, detail = str(content["reason"]), str(content["detail"])
    except (ValueError, KeyError, TypeError):
        reason, detail = "unexpected_answer", answer.text[:200] or answer.reason_phrase
    wait = parse_retry_after(answer.headers.get("Retry-After"), time.time())
    return DaemonError(answer.status_code, reason, detail, wait)


def unreachable(error: httpx.TransportError) -> DaemonError:
    """Return the error of a request that got no answer."""
    wrong = isinstance(error, httpx.LocalProtocolError | httpx.UnsupportedProtocol)
    return DaemonError(None, "bad_request" if wrong else "unreachable", f"{type(error).__name__}: {error}")


def parse_retry_after(header: str | None, now: float) -> float:
    """Return the seconds in a Retry-After header, given as seconds or as a date; 0 without a header."""
    if header is None:
        return 0.0
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - now)
    except ValueError:
        return 0.0


def _encode(tensors: Mapping[str, Any], safetensors: bool) -> tuple[bytes, str]:
    named: dict[str, Any] = {}
    for name, value in tensors.items():
        named |= {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, Mapping) else {name: value}
    if safetensors:
        import numpy as np
        from safetensors.numpy import save

        arrays = {name: np.ascontiguousarray(_detach(value)) for name, value in named.items()}
        return save(arrays), TENSORS
    return _to_json(named), JSON_TYPE


def _detach(value: Any) -> Any:
    """Return a tensor of torch as one that NumPy can read; anything else as it is."""
    return value.detach().cpu() if hasattr(value, "detach") else value


def _to_json(value: Any) -> bytes:
    try:
        return json.dumps(value, default=_to_lists, allow_nan=False, separators=(",", ":")).encode()
    except ValueError as error:
        raise ValueError(f"JSON has no NaN and no infinite numbers: {error}") from error


def _to_lists(value: Any) -> Any:
    if isinstance(value, SupportsToList):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is neither a number, a list nor an array")


def _read_receipt(answer: httpx.Response) -> Receipt:
    content = answer.json()
    return Receipt(str(content["id"]), int(content["round"]), duplicate=answer.status_code == 200)


def _read_adaptation(answer: httpx.Response) -> Adaptation:
    tensors = _read_object(answer)
    round = int(tensors.pop("round"))
    return Adaptation(round, tensors.get("predictions", []), tensors.get("labels"), tensors)


def _read_round_status(answer: httpx.Response) -> RoundStatus:
    content = answer.json()
    return RoundStatus(content["status"], content["round"], content["loss_before"], content["loss_after"])


def _read_verdict(answer: httpx.Response) -> Verdict:
    content = _read_object(answer)
    interval = content["interval"]
    pair = None if interval is None else (float(interval[0]), float(interval[1]))
    return Verdict(content["state"], content["sentence"], content["gain"], pair, content)


def _read_object(answer: httpx.Response) -> dict[str, Any]:
    content = answer.json()
    if not isinstance(content, dict):
        raise TypeError("the answer is not an object")
    return content
