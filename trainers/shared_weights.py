"""Frozen weights in a file that all processes of a machine map into memory, so that the machine holds them once."""

import fcntl
import hashlib
import mmap
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from online_meta.functional.stateless import NOT_KEPT, KeptWeights
from online_meta.types import Params

SMALLEST = 1 << 16
"""Bytes of a weight that is worth a page of its own in the file; smaller ones stay in each process."""

NAMED = "frozen-{}.bin"

# Memory that is only reserved counts for nothing: pages are read from the file, and may be dropped at any time.
FLAGS = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)


def share_frozen_weights(module: nn.Module, folder: str | Path) -> KeptWeights:
    """Replace the large frozen weights of a module by views of a file that processes share, with the same bits.

    The file is named by the SHA-256 of what it holds. It is written unless the folder has it already with these bits.
    Its pages belong to the cache of the operating system: one copy serves all processes of the machine, and the system
    may drop it. A process that writes to a weight changes its own copy alone.

    Args:
        module: the model, on the CPU; its frozen weights are those with ``requires_grad`` false.
        folder: on a local disk or in memory (tmpfs); it is created, for this user alone.

    Returns:
        The weights by name; ``release`` drops their pages from the process's memory.

    Raises:
        ValueError: if the folder cannot be written, or its disk is full.
    """
    weights = {
        name: weight.detach()
        for name, weight in module.named_parameters()
        if not weight.requires_grad and weight.nbytes >= SMALLEST
    }
    if not weights:
        return NOT_KEPT
    place = Path(folder).expanduser()
    file = place / NAMED.format(_hash(weights))
    with _report(place), _lock(place):  # Of two files of one name, each would take memory.
        kept = _open(file, weights)
        if kept is None:
            _publish(file, weights)
            kept = _open(file, weights)
    if kept is None:
        raise ValueError(f"{file} does not hold what was written to it: check the disk, or take another folder")
    for name, weight in module.named_parameters():
        if name in kept.tensors:
            weight.data = kept.tensors[name]
    return kept


class _InFiles(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode in which large tensors without values are pages of files without names, with which modules are built.

    The system can write such pages to the disk, so that a model may be larger than the memory.

    Args:
        folder: of the files; it is created, for this user alone.
    """

    def __init__(self, folder: str | Path) -> None:
        """Take the folder."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._folder = Path(folder).expanduser()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and replace its result if that has no values yet."""
        result = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten.empty.memory_format or result.device.type != "cpu" or result.nbytes < SMALLEST:
            return result
        with _report(self._folder), tempfile.NamedTemporaryFile(dir=self._folder) as file:
            values = torch.from_file(file.name, shared=True, size=result.numel(), dtype=result.dtype)
        return values.as_strided(result.shape, result.stride())


def build_in(folder: str) -> AbstractContextManager[Any]:
    """Return a context in which modules are built in files of a folder; "" for in memory."""
    return _InFiles(folder) if folder else nullcontext()


def _hash(weights: Params) -> str:
    found = hashlib.sha256()
    for name, value in weights.items():
        found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        found.update(_view_bytes(value).numpy().data)
    return found.hexdigest()


def _view_bytes(value: Tensor) -> Tensor:
    return value.contiguous().view(-1).view(torch.uint8)


class _Place(NamedTuple):
    """Where a weight is in a file: its first byte, and a tensor like it without values."""

    begin: int
    like: Tensor

    @property
    def end(self) -> int:
        return self.begin + self.like.nbytes


def _lay_out(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor, _Place]]:
    """Yield each weight with its place; each begins a page, which can be dropped without the others."""
    end = 0
    for name, value in weights:
        place = _Place(-(-end // mmap.PAGESIZE) * mmap.PAGESIZE, value.to("meta"))
        end = place.end
        yield name, value, place


def _write(file: IO[bytes], weights: Iterable[tuple[str, Tensor]]) -> dict[str, _Place]:
    places = {}
    for name, value, place in _lay_out(weights):
        file.seek(place.begin)
        file.write(_view_bytes(value).numpy().data)
        places[name] = place
    file.flush()
    return places


@contextmanager
def _report(folder: Path) -> Iterator[None]:
    """Make the folder; raise ``ValueError`` for what fails in the block on its disk."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ValueError(f"frozen weights cannot be kept in {folder}: {error.strerror or error}") from error


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Let one process at a time into the block."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _publish(file: Path, weights: Params) -> None:
    with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as new:
        try:
            _write(new, weights.items())
            os.replace(new.name, file)
        except BaseException:
            os.unlink(new.name)
            raise


def _open(file: Path, weights: Params) -> KeptWeights | None:
    """Return the weights in a file; None if it is missing or holds others."""
    places = {name: place for name, _, place in _lay_out(weights.items())}
    if not file.is_file() or file.stat().st_size != max(place.end for place in places.values()):
        return None
    with file.open("rb") as opened:
        kept = _map(opened, places, file.parent)
    for name, value in weights.items():
        if not torch.equal(_view_bytes(kept.tensors[name]), _view_bytes(value)):
            return None
        kept.release([name])
    return kept


def _map(file: IO[bytes], places: dict[str, _Place], folder: Path) -> KeptWeights:
    mapped = mmap.mmap(file.fileno(), 0, flags=FLAGS, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    tensors = {
        name: torch.frombuffer(mapped, dtype=like.dtype, count=like.numel(), offset=begin).view(like.shape)
        for name, (begin, like) in places.items()
    }

    def release(names: Collection[str]) -> None:
        for name in names:
            mapped.madvise(mmap.MADV_DONTNEED, places[name].begin, places[name].like.nbytes)

    return KeptWeights(tensors, release, partial(_store, folder))


def _store(folder: Path, weights: Iterable[tuple[str, Tensor]]) -> Params:
    """Return weights in a file without a name, which is gone when they are."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return _map(file, _write(file, weights), folder).tensors
