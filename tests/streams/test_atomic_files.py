"""Files that are replaced in one step."""

import os

import pytest

from streams.atomic_files import replace_file, write_durably


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_replaced_completely_and_no_other_file_is_left(tmp_path, durable):
    for data in (b"first", b"", b"second" * 10_000):
        replace_file(tmp_path / "file", data, durable=durable)
        assert (tmp_path / "file").read_bytes() == data
        assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("durable", [True, False])
def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path, monkeypatch, durable):
    replace_file(tmp_path / "file", b"old", durable=durable)
    seen, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append((a.read_bytes(), b.read_bytes())), replace(a, b))[1])
    replace_file(tmp_path / "file", b"new", durable=durable)
    assert seen == [(b"new", b"old")]


def test_data_is_made_durable_before_the_name(tmp_path, monkeypatch):
    said, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        said.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda a, b: (said.append("replace"), replace(a, b))[1])
    replace_file(tmp_path / "file", b"data", durable=True)
    assert said == ["file.new", "replace", tmp_path.name]


def test_bytes_are_synced_before_writing_returns(tmp_path, monkeypatch):
    sizes, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (sizes.append(os.fstat(file).st_size), fsync(file))[1])
    write_durably(tmp_path / "file", b"12345")
    assert sizes == [5]
