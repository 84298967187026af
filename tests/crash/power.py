"""The disk after a power loss: synced data is there; any other data may be there in full, in part, or not at all.

The model is stricter than any file system in use. A name survives only if its folder was synced. Each write that was
not synced survives or not, independently, and some survive only in sectors. Names in a folder that was not synced
survive up to any point.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.crash.recording import Call, acknowledgement

SECTOR = 512
NEITHER = ("-shm", ".acknowledged", "writer.lock")
"""Files that no start depends on: shared memory, which SQLite recreates, and files of these tests."""


class Op(NamedTuple):
    """One step, on the data of the file ``node`` or on the names of the folder ``node``.

    ``kind`` is "write" (``data`` at ``at``), "cut" (to ``at`` bytes), "name" (``links``: the node of each name from
    then on, or None) or "sync".
    """

    kind: str
    node: int
    at: int = 0
    data: bytes = b""
    links: tuple[tuple[str, int | None], ...] = ()


class Life(NamedTuple):
    """All steps, the acknowledgements as (number of steps before it, content), and the node of the parent folder."""

    ops: list[Op]
    acknowledged: list[tuple[int, dict[str, int]]]
    top: int
    folders: set[int]


class _Reader:
    """Follows the names through the calls, so that each step refers to a node and not to a path."""

    def __init__(self, above: Path) -> None:
        self.above = str(above)
        self.nodes: dict[str, int] = {self.above: 0}
        self.folders = {0}
        self.ops: list[Op] = []
        self.acknowledged: list[tuple[int, dict[str, int]]] = []
        self.places: dict[int, int] = {}
        self.sizes: dict[int, int] = defaultdict(int)

    def new(self, path: str, *, folder: bool = False) -> None:
        node = len(self.ops) + 1
        self.nodes[path] = node
        self.folders |= {node} if folder else set()
        self.name((path, node))

    def name(self, *links: tuple[str, int | None]) -> None:
        parent = str(Path(links[0][0]).parent)
        assert all(str(Path(path).parent) == parent for path, _ in links), "a rename from folder to folder"
        named = tuple((Path(path).name, node) for path, node in links)
        self.ops.append(Op("name", self.nodes[parent], links=named))

    def write(self, path: str, at: int, data: bytes) -> None:
        if (node := self.nodes.get(path)) is not None:
            self.ops.append(Op("write", node, at, data))
            self.sizes[node] = max(self.sizes[node], at + len(data))

    def cut(self, path: str, at: int) -> None:
        if (node := self.nodes.get(path)) is not None:
            self.ops.append(Op("cut", node, at))
            self.sizes[node] = at

    def read(self, call: Call) -> None:
        if (said := acknowledgement(call)) is not None:
            self.acknowledged.append((len(self.ops), said))
        elif call.name == "openat":
            self._open(call)
        elif call.name == "pwrite64":
            self.write(call.path(), call.last_number(), call.texts()[0][: call.returned])
        elif call.name == "write":
            at = self.places.get(call.descriptor(), 0)
            self.write(call.path(), at, call.texts()[0][: call.returned])
            self.places[call.descriptor()] = at + call.returned
        elif call.name == "ftruncate":
            self.cut(call.path(), call.last_number())
        elif call.name in ("fsync", "fdatasync"):
            if call.path() in self.nodes:
                self.ops.append(Op("sync", self.nodes[call.path()]))
        else:
            self._rename(call)

    def _open(self, call: Call) -> None:
        path = call.file or ""
        if not path.startswith(self.above + "/") or path.endswith(NEITHER):
            return
        self.places[call.returned] = self.sizes[self.nodes[path]] if "O_APPEND" in call.arguments else 0
        if "O_CREAT" in call.arguments and path not in self.nodes:
            self.new(path)
            self.places[call.returned] = 0
        elif "O_TRUNC" in call.arguments:
            self.cut(path, 0)

    def _rename(self, call: Call) -> None:
        paths = [text.decode() for text in call.texts()]
        if call.name == "unlinkat" and not call.arguments.startswith("AT_FDCWD"):
            paths = [f"{call.path()}/{paths[0]}"]
        if not paths[0].startswith(self.above + "/") or paths[0].endswith(NEITHER):
            return
        if call.name == "mkdir":
            self.new(paths[0], folder=True)
        elif call.name == "rename":
            self.nodes[paths[1]] = self.nodes.pop(paths[0])
            self.name((paths[0], None), (paths[1], self.nodes[paths[1]]))
        else:
            assert call.name in ("unlink", "unlinkat", "rmdir"), call.name
            self.name((paths[0], None))
            del self.nodes[paths[0]]


def parse_life(folder: Path, calls: Sequence[Call]) -> Life:
    """Return the steps of a life whose history is in ``folder``."""
    reader = _Reader(folder.parent)
    for call in calls:
        if call.name == "openat" and call.file and call.file.startswith(reader.above + "/"):
            # A folder or file that is opened without being created existed before the life.
            assert call.file in reader.nodes or "O_CREAT" in call.arguments or call.file.endswith(NEITHER), call.file
        reader.read(call)
    return Life(reader.ops, reader.acknowledged, 0, reader.folders)


def lose_power(life: Life, cut: int, chance: random.Random, into: Path) -> list[dict[str, int]]:
    """Build under ``into`` one of the disks that a power loss after ``cut`` steps may leave.

    Returns what was acknowledged before the loss.
    """
    synced: dict[int, int] = {}
    for index, op in enumerate(life.ops[:cut]):
        if op.kind == "sync":
            synced[op.node] = index
    luck = chance.choice([0.0, 0.3, 0.7, 1.0])
    contents: dict[int, bytearray] = defaultdict(bytearray)
    names: dict[int, dict[str, int]] = defaultdict(dict)
    over: set[int] = set()  # folders in which nothing later survives
    for index, op in enumerate(life.ops[:cut]):
        sure = index < synced.get(op.node, -1)
        if op.kind == "name":
            if not sure and op.node not in over and chance.random() > luck:
                over.add(op.node)
            if sure or op.node not in over:
                _link(names[op.node], op.links)
        elif sure or chance.random() < luck:
            _apply(contents[op.node], op, whole=sure or chance.random() < 0.7, chance=chance)
    _write_out(life, life.top, names, contents, into)
    return [said for after, said in life.acknowledged if after <= cut]


def _link(folder: dict[str, int], links: tuple[tuple[str, int | None], ...]) -> None:
    for name, node in links:
        if node is None:
            folder.pop(name, None)
        else:
            folder[name] = node


def _apply(content: bytearray, op: Op, *, whole: bool, chance: random.Random) -> None:
    if op.kind == "cut":
        del content[op.at :]
        content.extend(bytes(max(0, op.at - len(content))))
    elif op.kind == "write":
        content.extend(bytes(max(0, op.at + len(op.data) - len(content))))
        for first in range(0, len(op.data), SECTOR):
            piece = op.data[first : first + SECTOR]
            if whole or chance.random() < 0.5:
                content[op.at + first : op.at + first + len(piece)] = piece


def _write_out(
    life: Life, node: int, names: dict[int, dict[str, int]], contents: dict[int, bytearray], into: Path
) -> None:
    into.mkdir(parents=True, exist_ok=True)
    for name, child in names[node].items():
        if child in life.folders:
            _write_out(life, child, names, contents, into / name)
        else:
            (into / name).write_bytes(contents[child])
