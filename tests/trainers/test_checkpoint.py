"""A checkpoint is whole or invisible, whatever is killed or damaged; the last good one always loads."""

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
from tests.support.processes import hear, kill, start
from trainers.checkpoint import CheckpointError, list_checkpoints, load_checkpoint, load_latest, save_checkpoint


def bits(checkpoint):
    return (checkpoint.rounds, {n: frozen(p) for n, p in checkpoint.learners.items()}, checkpoint.settings)


def saved(folder, *rounds, keep=9):
    for number in rounds:
        save_checkpoint(folder, dying.checkpoint(number), keep)
    return folder


def test_what_is_loaded_is_what_was_saved(tmp_path):
    assert save_checkpoint(tmp_path / "a" / "b", dying.checkpoint(5), keep=1) >= 0
    assert bits(load_latest(tmp_path / "a" / "b")) == bits(dying.checkpoint(5))
    assert (tmp_path / "a" / "b" / "LATEST").read_text() == "5\n"


def test_tensors_that_are_views_are_saved_as_they_look(tmp_path):
    matrix = torch.arange(12.0).reshape(3, 4)
    state = dying.checkpoint(1)._replace(learners={"ftml": {"a": matrix.T, "b": matrix[1:, ::2], "n": torch.tensor(7)}})
    save_checkpoint(tmp_path, state, keep=1)
    assert bits(load_latest(tmp_path)) == bits(state)


def test_where_nothing_was_saved_there_is_nothing(tmp_path):
    assert load_latest(tmp_path) is None
    assert load_latest(tmp_path / "missing") is None


def test_the_newest_few_are_kept(tmp_path):
    saved(tmp_path, 2, 9, 10, 100, keep=3)
    assert list_checkpoints(tmp_path) == [9, 10, 100]
    saved(tmp_path, 101, keep=1)
    assert list_checkpoints(tmp_path) == [101]


def test_going_back_leaves_no_damaged_newer_one_in_the_way(tmp_path):
    """With keep = 1 it would be the one that is kept, and the good one deleted."""
    saved(tmp_path, 10, 20, 30)
    for rounds in (20, 30):
        (tmp_path / str(rounds) / "manifest.json").write_bytes(b"")
    assert load_latest(tmp_path).rounds == 10
    saved(tmp_path, 12, keep=1)
    assert list_checkpoints(tmp_path) == [12]
    assert load_latest(tmp_path).rounds == 12


def test_a_round_that_is_saved_again_replaces_the_damaged_one(tmp_path):
    saved(tmp_path, 1, 2)
    (tmp_path / "2" / "ftml.0.safetensors").unlink()
    assert load_latest(tmp_path).rounds == 1
    saved(tmp_path, 2)
    assert bits(load_latest(tmp_path)) == bits(dying.checkpoint(2))


def test_what_a_kill_left_unfinished_is_cleared_away(tmp_path):
    saved(tmp_path, 1)
    shutil.copytree(tmp_path / "1", tmp_path / ".2.unfinished")
    assert load_latest(tmp_path).rounds == 1
    saved(tmp_path, 3)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["1", "3", "LATEST"]


def test_there_is_no_pickle_only_safetensors_and_json(tmp_path):
    files = [file for file in saved(tmp_path, 4).rglob("*") if file.is_file()]
    assert sorted({file.suffix for file in files}) == ["", ".json", ".safetensors"]
    for file in files:
        if file.suffix == ".safetensors":
            load(file.read_bytes())
        else:
            json.loads(file.read_text())


def test_every_file_that_a_checkpoint_needs_is_named_with_its_sha256(tmp_path):
    folder = saved(tmp_path, 4) / "4"
    manifest = json.loads((folder / "manifest.json").read_text())
    digests = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.glob("*.safetensors")}
    assert manifest["sha256"] == digests
    assert len(digests) == 3


def places():
    """Name some bytes of each tensor file to flip: the file, and where in it (0 to 1)."""
    chance = random.Random(11)
    for name in ("ftml", "train_on_everything", "from_scratch"):
        yield from ((f"{name}.0.safetensors", chance.random()) for _ in range(12))


@pytest.mark.parametrize(("name", "at"), list(places()))
def test_a_flipped_bit_is_passed_over_for_the_checkpoint_before(tmp_path, name, at, caplog):
    file = saved(tmp_path, 1, 2) / "2" / name
    data = bytearray(file.read_bytes())
    data[int(at * len(data))] ^= 1 << int(at * 800) % 8
    file.write_bytes(data)
    assert bits(load_latest(tmp_path)) == bits(dying.checkpoint(1))
    assert f"skipping the checkpoint of round 2: {file} is damaged" in caplog.text


def test_no_flipped_bit_of_the_manifest_gives_anything_but_what_was_saved(tmp_path, caplog):
    """White space aside, each one is seen; none is taken for another format, other settings or another round."""
    file = saved(tmp_path, 1, 2) / "2" / "manifest.json"
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
def test_a_manifest_that_is_none_is_passed_over(tmp_path, content):
    (saved(tmp_path, 1, 2) / "2" / "manifest.json").write_bytes(content)
    assert load_latest(tmp_path).rounds == 1


@pytest.mark.parametrize("name", ["manifest.json", "ftml.0.safetensors"])
def test_a_file_that_is_gone_is_named(tmp_path, name):
    (saved(tmp_path, 1, 2) / "2" / name).unlink()
    with pytest.raises(CheckpointError, match=f"2/{name} cannot be read: .*No such file"):
        load_checkpoint(tmp_path / "2")
    assert load_latest(tmp_path).rounds == 1


def test_where_all_are_damaged_the_newest_ones_problem_is_raised(tmp_path):
    saved(tmp_path, 1, 2)
    for rounds in ("1", "2"):
        (tmp_path / rounds / "ftml.0.safetensors").write_bytes(b"not this")
    with pytest.raises(
        CheckpointError, match=r"2/ftml\.0\.safetensors is damaged: its SHA-256 differs from the manifest"
    ):
        load_latest(tmp_path)


def of_format(folder, number):
    """Make the checkpoint what a version of another format would have written."""
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["manifest"]
    manifest["format"] = number
    manifest["news"] = [1.5, "é"]
    digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    file.write_text(json.dumps({**manifest, "manifest": digest}))


def test_a_newer_format_is_refused_and_not_gone_back_behind(tmp_path):
    """A run that went back would learn its rounds again in the old format, and delete the newer checkpoint."""
    of_format(saved(tmp_path, 1, 2) / "2", 3)
    with pytest.raises(CheckpointError, match=r"2 has format 3; this online-meta reads formats 1 and 2"):
        load_latest(tmp_path)


def test_an_older_checkpoint_of_another_format_does_not_matter(tmp_path):
    of_format(saved(tmp_path, 1, 2) / "1", 7)
    assert load_latest(tmp_path).rounds == 2


def test_kills_at_random_moments_lose_no_checkpoint_that_was_acknowledged(tmp_path):
    chance, last, acknowledged = random.Random(5), 0, 0
    for _ in range(12):
        process, told = start(dying.save_for_ever, str(tmp_path), last)
        first = told.recv()
        process.join(chance.uniform(0.0, 0.15))  # it never ends by itself: this is the random moment
        kill(process)
        said = [first, *hear(told)]
        assert process.exitcode == -signal.SIGKILL
        found = load_latest(tmp_path)
        assert found.rounds in (said[-1], said[-1] + 1)
        assert bits(found) == bits(dying.checkpoint(found.rounds, 100_000))
        assert len(list_checkpoints(tmp_path)) <= 3
        last, acknowledged = found.rounds, acknowledged + len(said)
    assert acknowledged >= 12


def test_a_kill_at_any_step_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    """The last checkpoint but one is being deleted in the same save."""
    survived, points, newest = False, 0, set()
    while not survived:
        points += 1
        folder = tmp_path / str(points)
        saved(folder, 1, 2, keep=2)
        process, told = start(dying.save_dying, str(folder), 3, points)
        survived = hear(told) == ["survived"]
        process.join()
        found = load_latest(folder)
        assert found.rounds == list_checkpoints(folder)[-1], "what is there by its name is whole"
        assert found.rounds in (2, 3)
        assert bits(found) == bits(dying.checkpoint(found.rounds))
        newest.add(found.rounds)
        saved(folder, 4, keep=2)  # and the next save is not in the way of what was left
        assert list_checkpoints(folder)[-1] == 4
        assert not list(folder.glob(".*"))
    assert points > 10
    assert newest == {2, 3}
