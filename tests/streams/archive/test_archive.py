"""An archive keeps the same promises wherever it is stored. Damage to any byte of any file is found."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import zarr

from streams.history.archive import BlobStore, FileChecksum
from streams.history.archive.archive import Archive
from streams.history.archive.segment import Segment, StoredRound, list_arrays
from streams.history.archive.shards import write_group
from streams.history.archive.stores import FolderStore, is_url, open_store
from streams.history.errors import ArchiveUnreachable, HistoryDamaged, HistoryFormatError
from tests.support.object_store import BucketServer, free_port

Keep = Callable[..., StoredRound]


@pytest.fixture
def rounds(keep: Keep) -> list[StoredRound]:
    return [keep(round) for round in (3, 4, 5, 8, 9)]


def test_published_rounds_are_read_back_by_any_reader(store: BlobStore, rounds: list[StoredRound]) -> None:
    marker = Archive(store).publish(rounds)
    archive = Archive(store)
    assert archive.names() == [marker.name]
    assert archive.marker(marker.name) == marker
    assert (marker.first, marker.last, marker.count) == (3, 9, 5)
    assert archive.segment(marker.name).read_all() == rounds
    assert [archive.payload(marker.name, kept.entry.round) for kept in rounds] == [kept.payload for kept in rounds]
    assert archive.check_files(marker) == []


def test_a_round_missing_from_a_segment_is_reported_as_damage(store: BlobStore, rounds: list[StoredRound]) -> None:
    archive = Archive(store)
    marker = archive.publish(rounds)
    for round in (0, 6, 10):
        with pytest.raises(HistoryDamaged, match=marker.name):
            archive.payload(marker.name, round)


def test_the_tensors_are_readable_with_zarr_alone(tmp_path: Path, rounds: list[StoredRound]) -> None:
    marker = Archive(open_store(str(tmp_path), {})).publish(rounds)
    group = zarr.open_group(tmp_path / "segments" / marker.name, mode="r")
    assert group["round"][:].tolist() == [3, 4, 5, 8, 9]
    assert group["support_x_shape"][:].tolist() == [[4, 2], [5, 2], [6, 2], [2, 2], [3, 2]]
    assert group["support_x"].dtype == np.float32
    assert group["support_x"].shape == (40,)
    assert group["support_y"].dtype == np.int64
    assert json.loads(group["about"][: int(group["about_end"][0])].tobytes()) == ["id-3", "é", "3"]


def test_a_segment_without_its_marker_is_invisible_and_is_removed(store: BlobStore, rounds: list[StoredRound]) -> None:
    archive = Archive(store)
    kept = archive.publish(rounds)
    lost = archive.publish(rounds)
    assert lost.name != kept.name
    store.remove(f"markers/{lost.name}.json")
    assert archive.names() == [kept.name]
    archive.remove_orphans()
    assert store.names("segments") == [kept.name]
    archive.discard(kept.name)
    assert store.names("segments") == store.names("markers") == []


def test_a_killed_writer_does_not_block_the_next(store: BlobStore, rounds: list[StoredRound], keep: Keep) -> None:
    archive = Archive(store)
    path = "segments/000000000003-000000000009-0"
    write_group(store, path, *list_arrays([keep(round) for round in range(30)]))
    marker = archive.publish(rounds)
    assert archive.segment(marker.name).read_all() == rounds
    assert archive.check_files(marker) == []


def test_every_flipped_byte_is_found(tmp_path: Path, rounds: list[StoredRound]) -> None:
    archive = Archive(open_store(str(tmp_path), {}))
    marker = archive.publish(rounds)
    for file in marker.files:
        path = tmp_path / "segments" / marker.name / file
        whole = path.read_bytes()
        for at in {0, len(whole) // 2, len(whole) - 1}:
            path.write_bytes(flipped(whole, at))
            assert archive.check_files(marker) == [f"{file} is damaged"]
        path.write_bytes(whole)
    assert archive.check_files(marker) == []


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_a_flipped_bit_in_the_tensors_is_detected_on_reading(tmp_path: Path, rounds: list[StoredRound]) -> None:
    """Each inner chunk has its own checksum, so reading finds the damage without the marker."""
    marker = Archive(open_store(str(tmp_path), {})).publish(rounds)
    path = tmp_path / "segments" / marker.name / "support_x" / "c" / "0"
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(flipped(whole, at))
        with pytest.raises(HistoryDamaged, match=marker.name):
            Archive(open_store(str(tmp_path), {})).payload(marker.name, 4)


@pytest.mark.parametrize("damaged", ["zarr.json", "support_x/zarr.json", "support_x/c/0", "round/c/0"])
def test_a_segment_that_does_not_read_back_is_not_published(
    tmp_path: Path, rounds: list[StoredRound], monkeypatch: pytest.MonkeyPatch, damaged: str
) -> None:
    write = FolderStore.write

    def write_wrongly(store: FolderStore, path: str, pieces: Iterable[bytes]) -> FileChecksum:
        data = b"".join(pieces)
        return write(store, path, [flipped(data, len(data) // 2) if path.endswith(f"-0/{damaged}") else data])

    archive = Archive(open_store(str(tmp_path), {}))
    monkeypatch.setattr(FolderStore, "write", write_wrongly)
    with pytest.raises(HistoryDamaged, match="the segment of rounds 3 to 9 cannot be read"):
        archive.publish(rounds)
    assert archive.names() == []
    monkeypatch.undo()
    assert archive.check_files(archive.publish(rounds)) == []


def test_missing_and_unexpected_files_are_found(store: BlobStore, rounds: list[StoredRound]) -> None:
    archive = Archive(store)
    marker = archive.publish(rounds)
    store.remove(f"segments/{marker.name}/query_x/c/0")
    store.put(f"segments/{marker.name}/more", b"?")
    assert archive.check_files(marker) == ["query_x/c/0 is missing", "more is not one of its files"]
    with pytest.raises(HistoryDamaged, match=marker.name):
        Archive(store).payload(marker.name, 3)


def test_a_damaged_marker_is_found(store: BlobStore, rounds: list[StoredRound]) -> None:
    archive = Archive(store)
    name = archive.publish(rounds).name
    path = f"markers/{name}.json"
    whole = store.get(path)
    store.put(path, whole.replace(b'"last": 9', b'"last": 8'))
    with pytest.raises(HistoryDamaged, match="its SHA-256 does not match its content"):
        archive.marker(name)
    store.put(path, whole[:50])
    with pytest.raises(HistoryDamaged, match=f"the marker of the segment {name} is damaged"):
        archive.marker(name)
    store.remove(path)
    with pytest.raises(HistoryDamaged, match=f"{name} lacks a file"):
        archive.marker(name)


def test_files_of_a_later_version_are_left_alone(tmp_path: Path, rounds: list[StoredRound]) -> None:
    archive = Archive(open_store(str(tmp_path), {}))
    name = archive.publish(rounds).name
    for file in (tmp_path / "markers" / f"{name}.json", tmp_path / "segments" / name / "zarr.json"):
        file.write_text(file.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(HistoryFormatError, match="has format 2; this version reads 1"):
        archive.marker(name)
    with pytest.raises(HistoryFormatError, match="has format 2; this version reads 1"):
        archive.segment(name)


def test_the_size_of_open_segments_is_bounded(tmp_path: Path, keep: Keep, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = Archive(open_store(str(tmp_path), {}))
    markers = [archive.publish([keep(round)]) for round in range(20)]
    one = max(archive.segment(marker.name).memory_bytes for marker in markers)
    assert len(archive._open) == 20
    monkeypatch.setattr("streams.history.archive.archive.OPEN_BYTES", 7 * one)
    archive = Archive(open_store(str(tmp_path), {}))
    for _ in range(2):
        for round, marker in enumerate(markers):
            assert archive.payload(marker.name, round) == keep(round).payload
    assert 7 <= len(archive._open) < 20
    assert sum(segment.memory_bytes for segment in archive._open.values()) <= 7 * one


def test_an_unreachable_object_store_is_not_damage(server: BucketServer, rounds: list[StoredRound]) -> None:
    gone = {**server.options, "endpoint": f"http://127.0.0.1:{free_port()}"}
    archive = Archive(open_store(server.url, {**gone, "retry_config": {"max_retries": 0}}))
    with pytest.raises(ArchiveUnreachable, match="cannot be reached"):
        archive.publish(rounds)
    with pytest.raises(ArchiveUnreachable, match="cannot be reached"):
        archive.payload("000000000003-000000000009-0", 3)


def test_urls_and_folders_are_distinguished_and_invalid_ones_refused() -> None:
    assert is_url("s3://bucket/prefix")
    assert not is_url("/somewhere/else")
    assert not is_url("C:\\somewhere")
    with pytest.raises(ValueError, match="cannot be opened"):
        open_store("ftp://server/folder", {})
    with pytest.raises(ValueError, match="apply only to object stores"):
        open_store("/somewhere", {"region": "x"})


def test_a_segment_reads_one_round_as_it_reads_all(tmp_path: Path, keep: Keep) -> None:
    rounds = [keep(round) for round in range(50)]
    store = open_store(str(tmp_path), {})
    write_group(store, "here", *list_arrays(rounds))
    segment = Segment(store.zarr_store("here"))
    assert segment.entries == [kept.entry for kept in rounds]
    assert [segment.payload(round) for round in range(50)] == [kept.payload for kept in rounds]
