"""Name the entity that a task belongs to, such as a store or a patient, in the task's id."""

import hashlib
import re

_PLAIN = re.compile(rb"[A-Za-z0-9:-]")
_ID = re.compile(r"(?P<source>.+?)\.\.(?P<key>(?:[A-Za-z0-9:-]|_[0-9a-f]{2})+)\.\.(?P<at>[A-Za-z0-9:_-]+)(?:\..*)?")


def make_entity_id(source: str, key: str, at: str) -> str:
    """Return the id of a task of an entity: "SOURCE..KEY..AT", such as "stores..Caf_c3_a9-7..120".

    Args:
        source: the name of the source.
        key: the entity's key, any text but the empty one. Bytes of its UTF-8 form other than ASCII letters, digits, ':'
            and '-' are written as "_" and two hexadecimal digits, so that different keys give different ids.
        at: what tells the tasks of the entity apart, such as the position of the first row.

    Returns:
        The id, which ``find_entity`` reads.

    Raises:
        ValueError: if the key is empty.
    """
    if not key:
        raise ValueError("the key of an entity is empty")
    return f"{source}..{quote_key(key)}..{at}"


def quote_key(key: str) -> str:
    """Return an entity's key as it is written in ids."""
    each = (bytes([byte]) for byte in key.encode())
    return "".join(one.decode() if _PLAIN.fullmatch(one) else f"_{one[0]:02x}" for one in each)


def find_entity(id: str) -> str | None:
    """Return the key of the entity that a task belongs to, None if the id names none; never raises."""
    found = _ID.fullmatch(id)
    if found is None:
        return None
    quoted = found["key"].encode()
    try:
        return re.sub(rb"_([0-9a-f]{2})", lambda byte: bytes.fromhex(byte[1].decode()), quoted).decode()
    except UnicodeDecodeError:
        return None


def digest_of(salt: str, text: str) -> str:
    """Return the SHA-256 of a salt and a text, in hexadecimal digits; it recognises a key or an id, and names none."""
    return hashlib.sha256(f"{salt}:{text}".encode()).hexdigest()
