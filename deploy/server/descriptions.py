"""Describe the bodies and the answers of the HTTP API, for its page and its reference."""

from typing import Any

from deploy.server.origins import JSON_TYPES, TENSOR_TYPES

TENSORS = TENSOR_TYPES[0]


def _task_body(*required: str, optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the description of a body with these tensors, as nested lists in JSON or as safetensors."""
    lists = {name: {"type": "array", "items": {}} for name in (*required, *optional)}
    schema = {"type": "object", "properties": lists, "required": list(required)}
    content = {
        **{media_type: {"schema": schema} for media_type in JSON_TYPES},
        **{media_type: {"schema": {"type": "string", "format": "binary"}} for media_type in TENSOR_TYPES},
    }
    return {"requestBody": {"required": True, "content": content}}


TASK_BODY = _task_body("support_x", "support_y", optional=("query_x", "query_y"))
ADAPT_BODY = _task_body("support_x", "support_y", "query_x")


TENSOR_RESPONSE: dict[int | str, dict[str, Any]] = {
    200: {"content": {TENSORS: {"schema": {"type": "string", "format": "binary"}}}}
}


ADAPT_RESPONSE: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {
            **TENSOR_RESPONSE[200]["content"],
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": {"round": {"type": "integer"}, "predictions": {"type": "array", "items": {}}},
                    "required": ["round", "predictions"],
                }
            },
        }
    }
}


ERROR: dict[str, Any] = {
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {"reason": {"type": "string"}, "detail": {"type": "string"}},
                "required": ["reason", "detail"],
            }
        }
    }
}


FAILING: dict[str, Any] = {
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {
                    "reason": {"type": "string"},
                    "detail": {"type": "string"},
                    "failing": {"type": "array", "items": {"type": "string"}},
                },
                "required": ["reason", "detail", "failing"],
            }
        }
    }
}


RECEIPT: dict[str, Any] = {
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {"id": {"type": "string"}, "round": {"type": "integer"}},
                "required": ["id", "round"],
            }
        }
    }
}


TASK_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "A duplicate of a durable task; `round` is the round of that task", **RECEIPT},
    201: {"description": "The task is durable", **RECEIPT},
    404: {"description": "This daemon does not accept tasks over HTTP", **ERROR},
    409: {"description": "The id belongs to a task with a different body", **ERROR},
    408: {"description": "The body did not arrive in time", **ERROR},
    413: {"description": "The body exceeds a limit, as received or decompressed", **ERROR},
    415: {"description": "The Content-Type or Content-Encoding is not accepted; see Accept, Accept-Encoding", **ERROR},
    422: {"description": "Not a valid task of this run; `reason` is a fixed slug, `detail` a sentence", **ERROR},
    429: {"description": "Too many rounds are pending or bodies in progress; see Retry-After", **ERROR},
    503: {"description": "The daemon is draining", **ERROR},
    507: {"description": "The disk is full; the task was not stored", **ERROR},
}


ADAPT_ERRORS: dict[int | str, dict[str, Any]] = {
    **{status: TASK_RESPONSES[status] for status in (408, 413, 415, 422)},
    429: {"description": "Too many bodies in progress; see Retry-After", **ERROR},
    503: {"description": "No meta-parameters have been published yet", **ERROR},
}


QUARANTINE_ERRORS: dict[int | str, dict[str, Any]] = {
    404: {"description": "No such round", **ERROR},
    409: {"description": "The round is in quarantine already", **ERROR},
    410: {"description": "Retention has removed the task of this round", **ERROR},
    415: {
        "description": "The request is not declared as `application/json`, which it must be even without a body",
        **ERROR,
    },
}


PROMOTION_ERRORS: dict[int | str, dict[str, Any]] = {
    404: {"description": "No such branch", **ERROR},
    409: {"description": "The branch is served already, or it cannot be served", **ERROR},
    415: QUARANTINE_ERRORS[415],
    503: {"description": "The branch has not learned enough rounds yet; see Retry-After", **ERROR},
}


def _entity_body(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    """Return the description of a body in JSON about an entity."""
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    schema |= {"required": required} if required else {}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


_ROWS: dict[str, Any] = {"rows": {"type": "array", "items": {"type": "object"}}}
PREDICT_BODY = _entity_body({**_ROWS, "keep": {"type": "boolean", "default": False}}, ["rows"])
OBSERVE_BODY = _entity_body({**_ROWS, "prediction": {"type": "string"}, "labels": {"type": "array", "items": {}}}, [])


_ENTITY_ERRORS: dict[int | str, dict[str, Any]] = {
    **{status: TASK_RESPONSES[status] for status in (408, 413, 415, 422, 429)},
    503: {
        "description": "The daemon drains, or what it answers from is not known yet; see Retry-After",
        **ERROR,
    },
}
PREDICT_RESPONSES: dict[int | str, dict[str, Any]] = {
    **_ENTITY_ERRORS,
    404: {"description": "This daemon keeps no predictions, because it does not accept rows over HTTP", **ERROR},
    507: {"description": "No further prediction can be kept, or the disk is full", **ERROR},
}
OBSERVE_RESPONSES: dict[int | str, dict[str, Any]] = {
    **_ENTITY_ERRORS,
    200: {"description": "The rows or labels are durable already"},
    201: {"description": "The rows or labels are durable"},
    404: {"description": "This daemon does not accept rows over HTTP, or no such prediction is kept", **ERROR},
    409: {"description": "The prediction has other labels already", **ERROR},
    507: TASK_RESPONSES[507],
}
