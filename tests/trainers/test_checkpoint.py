"""A checkpoint is either whole or invisible after any kill or damage, and the last good one always loads."""

import hashlib
import json
import random
import shutil
import signal

import pytest
import torch
from safetensors.torch import load

from online_meta.testing.learner_problems import frozen
from tests.support import dying
from tests.support.processes import kill, receive_all, start
from trainers.checkpoint import CheckpointError, list_checkpoints, load_checkpoint, load_latest, save_checkpoint


def bits(checkpoint):
    return (checkpoint.rounds, {n: frozen(p) for n, p in checkpoint.learners.items()}, checkpoint.settings)


def save_rounds(folder, *rounds, keep=9):
    for number in rounds:
        save_checkpoint(folder, dying.checkpoint(number), keep)
    return folder


def test_a_loaded_checkpoint_equals_the_saved_one(tmp_path):
    assert save_checkpoint(tmp_path / "a" / "b", dying.checkpoint(5), keep=1) >= 0
    assert bits(load_latest(tmp_path / "a" / "b")) == bits(dying.checkpoint(5))
    assert (tmp_path / "a" / "b" / "LATEST").read_text() == "5\n"


def test_views_are_saved_with_their_visible_values(tmp_path):
    matrix = torch.arange(12.0).reshape(3, 4)
    state = dying.checkpoint(1)._replace(learners={"ftml": {"a": matrix.T, "b": matrix[1:, ::2], "n": torch.tensor(7)}})
    save_checkpoint(tmp_path, state, keep=1)
    assert bits(load_latest(tmp_path)) == bits(state)


def test_load_latest_returns_none_without_a_checkpoint(tmp_path):
    assert load_latest(tmp_path) is None
    assert load_latest(tmp_path / "missing") is None


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    save_rounds(tmp_path, 2, 9, 10, 100, keep=3)
    assert list_checkpoints(tmp_path) == [9, 10, 100]
    save_rounds(tmp_path, 101, keep=1)
    assert list_checkpoints(tmp_path) == [101]


def test_saving_an_older_round_deletes_damaged_newer_checkpoints(tmp_path):
    """With keep = 1, the damaged checkpoint would otherwise be kept and the good one deleted."""
    save_rounds(tmp_path, 10, 20, 30)
    for rounds in (20, 30):
        (tmp_path / str(rounds) / "manifest.json").write_bytes(b"")
    assert load_latest(tmp_path).rounds == 10
    save_rounds(tmp_path, 12, keep=1)
    assert list_checkpoints(tmp_path) == [12]
    assert load_latest(tmp_path).rounds == 12


def test_saving_a_round_again_replaces_its_damaged_checkpoint(tmp_path):
    save_rounds(tmp_path, 1, 2)
    (tmp_path / "2" / "ftml.0.safetensors").unlink()
    assert load_latest(tmp_path).rounds == 1
    save_rounds(tmp_path, 2)
    assert bits(load_latest(tmp_path)) == bits(dying.checkpoint(2))


def test_a_save_removes_unfinished_folders_left_by_a_kill(tmp_path):
    save_rounds(tmp_path, 1)
    shutil.copytree(tmp_path / "1", tmp_path / ".2.unfinished")
    assert load_latest(tmp_path).rounds == 1
    save_rounds(tmp_path, 3)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["1", "3", "LATEST"]


def test_a_checkpoint_holds_only_safetensors_and_json(tmp_path):
    files = [file for file in save_rounds(tmp_path, 4).rglob("*") if file.is_file()]
    assert sorted({file.suffix for file in files}) == ["", ".json", ".safetensors"]
    for file in files:
        if file.suffix == ".safetensors":
            load(file.read_bytes())
        else:
            json.loads(file.read_text())


def test_the_manifest_lists_every_tensor_file_with_its_sha256(tmp_path):
    folder = save_rounds(tmp_path, 4) / "4"
    manifest = json.loads((folder / "manifest.json").read_text())
    digests = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.glob("*.safetensors")}
    assert manifest["sha256"] == digests
    assert len(digests) == 3


def flip_positions():
    """Yield bytes of each tensor file to flip: the file's name and the relative position (0 to 1)."""
    chance = random.Random(11)
    for name in ("ftml", "train_on_everything", "from_scratch"):
        yield from ((f"{name}.0.safetensors", chance.random()) for _ in range(12))


@pytest.mark.parametrize(("name", "at"), list(flip_positions()))
def test_a_checkpoint_with_a_flipped_bit_is_skipped_for_the_one_before(tmp_path, name, at, caplog):
    file = save_rounds(tmp_path, 1, 2) / "2" / name
    data = bytearray(file.read_bytes())
    data[int(at * len(data))] ^= 1 << int(at * 800) % 8
    file.write_bytes(data)
    assert bits(load_latest(tmp_path)) == bits(dying.checkpoint(1))
    assert f"skipping the checkpoint of round 2: {file} is damaged" in caplog.text


def test_a_flipped_bit_in_the_manifest_never_changes_what_is_loaded(tmp_path, caplog):
    """Every flip outside white space is detected; none is read as another format, settings or round."""
    file = save_rounds(tmp_path, 1, 2) / "2" / "manifest.json"
    data, harmless = file.read_bytes(), 0
    right = {rounds: bits(dying.checkpoint(rounds)) for rounds in (1, 2)}
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 7
        file.write_bytes(flipped)
        found = bits(load_latest(tmp_path))
        assert found in right.values(), at
        harmless += found[0] == 2
    assert harmless < 0.1 * len(data)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{}", b'{"format": 1}', b"\xff\xfe", b"\x00" * 500])
def test_an_invalid_manifest_is_skipped(tmp_path, content):
    (save_rounds(tmp_path, 1, 2) / "2" / "manifest.json").write_bytes(content)
    assert load_latest(tmp_path).rounds == 1


@pytest.mark.parametrize("name", ["manifest.json", "ftml.0.safetensors"])
def test_a_missing_file_is_named(tmp_path, name):
    (save_rounds(tmp_path, 1, 2) / "2" / name).unlink()
    with pytest.raises(CheckpointError, match=f"2/{name} cannot be read: .*No such file"):
        load_checkpoint(tmp_path / "2")
    assert load_latest(tmp_path).rounds == 1


def test_the_newest_checkpoints_error_is_raised_when_all_are_damaged(tmp_path):
    save_rounds(tmp_path, 1, 2)
    for rounds in ("1", "2"):
        (tmp_path / rounds / "ftml.0.safetensors").write_bytes(b"not this")
    with pytest.raises(
        CheckpointError, match=r"2/ftml\.0\.safetensors is damaged: its SHA-256 differs from the manifest"
    ):
        load_latest(tmp_path)


def set_format(folder, number):
    """Rewrite the checkpoint's manifest as a version with another format would have written it."""
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["manifest"]
    manifest["format"] = number
    manifest["news"] = [1.5, "é"]
    digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    file.write_text(json.dumps({**manifest, "manifest": digest}))


def test_a_newer_format_is_refused_instead_of_loading_an_older_checkpoint(tmp_path):
    """Loading the older one would relearn its rounds in the old format and delete the newer checkpoint."""
    set_format(save_rounds(tmp_path, 1, 2) / "2", 3)
    with pytest.raises(CheckpointError, match=r"2 has format 3; this online-meta reads formats 1 and 2"):
        load_latest(tmp_path)


def test_an_older_checkpoint_of_another_format_is_ignored(tmp_path):
    set_format(save_rounds(tmp_path, 1, 2) / "1", 7)
    assert load_latest(tmp_path).rounds == 2


def test_kills_at_random_moments_lose_no_acknowledged_checkpoint(tmp_path):
    chance, last, acknowledged = random.Random(5), 0, 0
    for _ in range(12):
        process, connection = start(dying.save_forever, str(tmp_path), last)
        first = connection.recv()
        process.join(chance.uniform(0.0, 0.15))  # the process never ends by itself, so this is a random moment
        kill(process)
        acknowledgements = [first, *receive_all(connection)]
        assert process.exitcode == -signal.SIGKILL
        found = load_latest(tmp_path)
        assert found.rounds in (acknowledgements[-1], acknowledgements[-1] + 1)
        assert bits(found) == bits(dying.checkpoint(found.rounds, 100_000))
        assert len(list_checkpoints(tmp_path)) <= 3
        last, acknowledged = found.rounds, acknowledged + len(acknowledgements)
    assert acknowledged >= 12


def test_a_kill_at_any_step_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    """The same save also deletes the oldest checkpoint."""
    survived, points, newest = False, 0, set()
    while not survived:
        points += 1
        folder = tmp_path / str(points)
        save_rounds(folder, 1, 2, keep=2)
        process, connection = start(dying.save_dying, str(folder), 3, points)
        survived = receive_all(connection) == ["survived"]
        process.join()
        found = load_latest(folder)
        assert found.rounds == list_checkpoints(folder)[-1], "the newest listed checkpoint is whole"
        assert found.rounds in (2, 3)
        assert bits(found) == bits(dying.checkpoint(found.rounds))
        newest.add(found.rounds)
        save_rounds(folder, 4, keep=2)  # the next save succeeds despite what was left
        assert list_checkpoints(folder)[-1] == 4
        assert not list(folder.glob(".*"))
    assert points > 10
    assert newest == {2, 3}
