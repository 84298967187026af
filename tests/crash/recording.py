"""The system calls by which a life changes its files, from strace: writes, names, syncs, and acknowledgements."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.crash.walker import Walker

CALLS = (
    "openat,pwrite64,write,writev,fsync,fdatasync,ftruncate,fallocate,rename,renameat,renameat2,link,linkat,"
    "unlink,unlinkat,mkdir,mkdirat,rmdir,sync_file_range,copy_file_range,sendfile,msync"
)
_LINE = re.compile(r"^(\d+) +(\w+)\((.*)\) += (-?\d+)(<.*>)?(?: .*)?$")
_UNFINISHED = re.compile(r"^(\d+) +(.*) <unfinished \.\.\.>$")
_RESUMED = re.compile(r"^(\d+) +<\.\.\. \w+ resumed>(.*)$")
_STRING = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')


class Call(NamedTuple):
    """A successful system call: its name, its arguments as strace prints them, and its return value."""

    name: str
    arguments: str
    returned: int
    file: str | None

    def texts(self) -> list[bytes]:
        """Return the strings among the arguments."""
        return [bytes.fromhex(text.replace("\\x", "")) for text in _STRING.findall(self.arguments)]

    def path(self) -> str:
        """Return the path of the descriptor in the first argument."""
        return _path_in(self.arguments)

    def descriptor(self) -> int:
        """Return the descriptor in the first argument."""
        return int(self.arguments.partition("<")[0])

    def last_number(self) -> int:
        """Return the last argument."""
        return int(self.arguments.rpartition(",")[2])


def record(walker: Walker, scenario: str) -> tuple[Path, list[Call]]:
    """Return the folder of a life without faults, and all calls that changed files."""
    log = walker.folder / f"{scenario}.strace"
    how = ["-e", f"trace={CALLS}", "-y", "--strings-in-hex=all", "-s", "10000000", "-o", str(log)]
    folder, status = walker.live(scenario, *how)
    assert status == 0, (walker.folder / "errors").read_text()
    return folder, list(_read(log))


def acknowledgement(call: Call) -> dict[str, Any] | None:
    """Return what a call acknowledged, or None."""
    if call.name != "writev":
        return None
    said: dict[str, Any] = json.loads(call.texts()[0])
    return said


def _read(log: Path) -> Iterator[Call]:
    begun: dict[str, str] = {}
    for line in log.read_text(encoding="ascii").splitlines():
        if "exited with" in line or "--- " in line:
            continue
        if found := _UNFINISHED.match(line):
            begun[found[1]] = found[2]
            continue
        if found := _RESUMED.match(line):
            line = f"{found[1]} {begun.pop(found[1])}{found[2]}"
        match = _LINE.match(line)
        assert match, line[:300]
        _, name, arguments, returned, file = match.groups()
        if int(returned) >= 0:
            yield Call(name, arguments, int(returned), _path_in(file) if file else None)


def _path_in(text: str) -> str:
    inside = text.partition("<")[2].partition(">")[0]
    return bytes.fromhex(inside.replace("\\x", "")).decode() if inside.startswith("\\x") else inside
