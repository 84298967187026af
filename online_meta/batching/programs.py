"""Keep compiled programs in folders: that of a run, and a cache that all runs of a user share."""

import fcntl
import hashlib
import json
import logging
import os
import platform
import stat
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

Program = Callable[..., tuple[Tensor, ...]]
"""A sum over stacked tasks whose arguments and results are the flattened tensors, in the order of their trees."""

FAILURE_SECONDS = 86400.0
"""How long a failure of the compiler counts: a compiler may be installed or repaired meanwhile."""

CACHE_BYTES = 2 * 10**9
"""The size of the cache above which programs leave it, those first that were not used for the longest time."""

LOCK = "compiling.lock"

PROFILED = "compiled program"
"""The name of a call of a compiled program in torch's profiles, where its kernels have none."""

log = logging.getLogger(__name__)


class Programs(NamedTuple):
    """The folder of a run's compiled programs, and the cache that it shares with other runs; None for no cache.

    Each program is a package ``DIGEST.pt2`` with a record ``DIGEST.json``. Packages contain machine code, so the cache
    must be a folder, and no link to one, that its owner alone can enter, and a package is loaded only if its content
    has the hash in its record. What is loaded is always in the run's own folder.
    """

    folder: Path
    cache: Path | None = None


class ProgramRecord(NamedTuple):
    """What is known of a program on a processor: the SHA-256 of its package, or why it is not used, and since when."""

    processor: str
    sha256: str = ""
    refusal: str = ""
    failed: bool = False
    at: float = 0.0


def as_programs(place: Path | Programs) -> Programs:
    """Return a folder as ``Programs`` without a cache."""
    return place if isinstance(place, Programs) else Programs(place)


@cache
def name_processor() -> str:
    """Return a hash of the processor's name and abilities: programs of one may be illegal on another."""
    found = {platform.machine(): None, platform.processor(): None}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found |= dict.fromkeys(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part")))
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:16]


def package_path(folder: Path, digest: str) -> Path:
    """Return the path in ``folder`` of the compiled program with ``digest``."""
    return folder / f"{digest}.pt2"


def record_path(folder: Path, digest: str) -> Path:
    """Return the path in ``folder`` of what is known of the program with ``digest``."""
    return folder / f"{digest}.json"


def load_program(place: Path | Programs, digest: str) -> Program | None:
    """Load the compiled program with ``digest``, taking it from the cache if need be; return None if it is not there.

    A program of another processor, one that has changed since it was compiled, and one in a folder that others can
    write to are not loaded; a warning says so.
    """
    programs = as_programs(place)
    if not (_has_own(programs.folder, digest) or _take_from_cache(programs, digest)):
        return None
    path = package_path(programs.folder, digest)
    try:
        # ``torch._inductor.aoti_load_package`` does this, and imports and starts compilers, which takes seconds.
        loader: Any = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
    except RuntimeError as error:
        log.warning("%s cannot be loaded and is compiled again: %s", path, str(error).partition("\n")[0])
        return None

    def run(*leaves: Tensor) -> tuple[Tensor, ...]:
        with record_function(PROFILED):
            return tuple(loader.boxed_run([*leaves]))

    return run


def has_program(place: Path | Programs, digest: str) -> bool:
    """Return whether ``load_program`` would find the program, without loading it."""
    programs = as_programs(place)
    return _has_own(programs.folder, digest) or _take_from_cache(programs, digest)


def _has_own(folder: Path, digest: str) -> bool:
    path = package_path(folder, digest)
    if not path.exists():
        return False
    if exposure := find_exposure(folder):
        log.warning("the programs in %s are not loaded: it %s", folder, exposure)
        return False
    record = _read_record(folder, digest)  # Without a cache there is none: what is there was compiled there.
    if record is None or not record.sha256:
        return True
    return _is_intact(path, record, path.read_bytes())


def _take_from_cache(programs: Programs, digest: str) -> bool:
    """Copy a program from the cache to the run's folder; return whether it was there, intact."""
    cache = programs.cache
    if cache is None or not package_path(cache, digest).exists() or not is_cache_usable(cache):
        return False
    record, path = _read_record(cache, digest), package_path(cache, digest)
    if record is None or not record.sha256:  # It is being written.
        return False
    try:
        content = _read_own_file(path)
    except OSError as error:
        log.warning("%s is not loaded, but compiled again: %s", path, error.strerror or error)
        return False
    if not _is_intact(path, record, content):
        return False
    programs.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _write(package_path(programs.folder, digest), content)
    _write_record(programs.folder, digest, record)
    os.utime(path)  # It was used now.
    return True


def compiled_at(folder: Path, digest: str) -> float | None:
    """Return when the program with ``digest`` was compiled, in seconds since 1970; None if its folder does not say."""
    record = _read_record(folder, digest)
    return record.at if record is not None and record.sha256 else None


def _is_intact(path: Path, record: ProgramRecord, content: bytes) -> bool:
    if record.processor != name_processor():
        log.warning("%s was compiled for another processor; it is compiled again", path)
        return False
    if hashlib.sha256(content).hexdigest() != record.sha256:
        log.warning("%s is not what was compiled: its content has another hash; it is compiled again", path)
        return False
    return True


def _read_own_file(path: Path) -> bytes:
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        if os.fstat(file.fileno()).st_uid != os.geteuid():
            raise PermissionError(f"{path} belongs to another user")
        return file.read()


def find_exposure(folder: Path, private: bool = False) -> str | None:
    """Say why programs in ``folder`` are not trusted; None if they are.

    Others must not be able to write to it. If it is to be ``private``, they cannot read it, and it is no link.
    """
    status = folder.lstat() if private else folder.stat()
    if private and stat.S_ISLNK(status.st_mode):
        return "is a symbolic link: name the folder itself"
    if not stat.S_ISDIR(status.st_mode):
        return "is not a folder"
    if status.st_uid != os.geteuid():
        return "belongs to another user"
    if status.st_mode & (0o077 if private else 0o002):
        return f"has mode {stat.S_IMODE(status.st_mode):04o}, so that others can use it: chmod 700 {folder}"
    return None


@cache
def _warn_once(folder: Path, problem: str) -> None:
    log.warning("no compiled program is taken from the cache or kept there: %s %s", folder, problem)


def is_cache_usable(cache: Path) -> bool:
    """Make the folder of the cache if need be; return whether it is safe to use, and warn once if it is not."""
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        problem = find_exposure(cache, private=True)
    except OSError as error:
        problem = f"cannot be used: {error.strerror}"
    if problem is not None:
        _warn_once(cache, problem)
    return problem is None


def keep_program(place: Path | Programs, digest: str) -> None:
    """Put a copy of the program that was just compiled into the run's folder into the cache, with a record of it."""
    folder, cache = as_programs(place)
    if cache is None or not is_cache_usable(cache):
        return
    content = package_path(folder, digest).read_bytes()
    record = ProgramRecord(name_processor(), hashlib.sha256(content).hexdigest(), at=time.time())
    _write_record(folder, digest, record)
    try:
        record_path(cache, digest).unlink(missing_ok=True)  # A reader meets no record or that of the package.
        _write(package_path(cache, digest), content)
        _write_record(cache, digest, record)
        _remove_oldest(cache)
    except OSError as error:
        log.warning("the program is not kept in %s: %s", cache, error)


def _remove_oldest(cache: Path) -> None:
    """Remove the programs from the cache that were not used for the longest time, until it is small enough."""
    newest_first = sorted(((path.stat().st_mtime, path) for path in cache.glob("*.pt2")), reverse=True)
    total = 0
    for _, path in newest_first:
        total += path.stat().st_size
        if total > CACHE_BYTES:
            record_path(cache, path.stem).unlink(missing_ok=True)
            path.unlink(missing_ok=True)


def refuse_program(place: Path | Programs, digest: str, reason: str, *, failed: bool = False) -> None:
    """Record that a program is not to be compiled again, and remove it from the cache.

    Args:
        place: the folder of the run, or it and the cache.
        digest: of the program.
        reason: why it is not used.
        failed: whether the compiler failed, which is forgotten after a day.
    """
    folder, cache = as_programs(place)
    record = ProgramRecord(name_processor(), refusal=reason, failed=failed, at=time.time())
    for one in [folder, *([cache] if cache is not None and is_cache_usable(cache) else [])]:
        try:
            one.mkdir(mode=0o700, parents=True, exist_ok=True)
            if one == cache:  # In the run's folder, another learner may use it.
                package_path(one, digest).unlink(missing_ok=True)
                _write_record(one, digest, record)
            elif not package_path(one, digest).exists():
                _write_record(one, digest, record)
        except OSError as error:
            log.warning("it is not noted in %s that a program is not used: %s", one, error)


def find_refusal(place: Path | Programs, digest: str) -> str | None:
    """Return why the program with ``digest`` is not to be compiled on this processor; None if nothing is known."""
    folder, cache = as_programs(place)
    for one in [folder, *([cache] if cache is not None and cache.exists() and is_cache_usable(cache) else [])]:
        record = _read_record(one, digest)
        if record is None or not record.refusal or record.processor != name_processor():
            continue
        if not record.failed or time.time() - record.at < FAILURE_SECONDS:
            return record.refusal
    return None


class CompilerBusy(RuntimeError):
    """Another program is being compiled on this machine: only one is at a time."""


def lock_compiler(place: Path | Programs) -> int:
    """Return the descriptor of a lock that only one process on this machine can hold; whoever dies frees it.

    Raises ``CompilerBusy`` while it is held elsewhere.
    """
    folder, cache = as_programs(place)
    if cache is not None and is_cache_usable(cache):
        where = cache / LOCK
        lock = os.open(where, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    else:
        where = folder  # A folder can be locked, too: one that nobody shares needs no further file.
        where.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(where, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise CompilerBusy(f"another program is being compiled, which holds {where}") from error
    except OSError:  # A file system without locks: compile without one.
        log.warning("%s cannot be locked: programs may be compiled at the same time", where)
    return lock


def _read_record(folder: Path, digest: str) -> ProgramRecord | None:
    try:
        raw = json.loads(record_path(folder, digest).read_bytes())
        return ProgramRecord(**{name: raw[name] for name in ProgramRecord._fields if name in raw})
    except (OSError, ValueError, TypeError):
        return None


def _write_record(folder: Path, digest: str, record: ProgramRecord) -> None:
    _write(record_path(folder, digest), json.dumps(record._asdict()).encode())


def _write(path: Path, content: bytes) -> None:
    """Replace a file, so that every reader finds the whole old or the whole new one."""
    part = path.with_name(f"{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb") as file:
            file.write(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
