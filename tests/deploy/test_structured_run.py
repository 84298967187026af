"""Runs of a model with two inputs, tokens and a mask, and of weighted samples, from HTTP to the replay."""

from pathlib import Path

import httpx
import torch
from safetensors.torch import load
from torch import Tensor

from deploy.leader import adapt_from_checkpoint
from deploy.predictions import decode_predictions, encode_predictions
from streams.formats import wire
from streams.history.history import History
from streams.history.verify import verify
from streams.spec import InputSpec, Limits, TaskSpec
from tests.deploy.conftest import Cli
from tests.support.daemon import encode, free_port, running_daemon, wait_for
from tests.support.finished import leader_hash, lines

SPEC = TaskSpec(x={"tokens": InputSpec((5,), "int64"), "mask": InputSpec((5,))}, ways=3)
ROUNDS = 10


def write_config(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "config.toml"
    path.write_text(f"""
[run]
path = "{folder}/run"
[task]
y = "class"
ways = 3
[task.x.tokens]
shape = [5]
dtype = "int64"
[task.x.mask]
shape = [5]
[model]
build = "tests.deploy.user_models:Masked"
loss = "cross_entropy"
[inner]
steps = 2
[meta]
batch = 2
[regret]
every_rounds = 5
hindsight_steps = 1
comparator = ["hindsight", "dynamic"]
baselines = ["from_scratch", "good_embedding", "ridge_head"]
options.from_scratch = {{ steps = 2 }}
[checkpoint]
every_rounds = 5
[history.sealing]
segment_rounds = 3
ledger_bytes = 0
[serve]
port = {free_port()}
""")
    return path


def make_task(t: int, weighted: bool = False) -> dict[str, Tensor]:
    """Return the tensors of a task in which the class is the sum of the valid tokens, modulo 3."""
    random, found = torch.Generator().manual_seed(t), {}
    for part, n in (("support", 6), ("query", 4)):
        tokens = torch.randint(12, (n, 5), generator=random)
        mask = (torch.arange(5) < torch.randint(1, 6, (n, 1), generator=random)).float()
        found |= {f"{part}_x.tokens": tokens, f"{part}_x.mask": mask}
        found[f"{part}_y"] = ((tokens * mask.long()).sum(1) + t) % 3
        if weighted:
            found[f"{part}_weight"] = torch.rand(n, generator=random).round(decimals=2)
            found[f"{part}_weight"][0], found[f"{part}_weight"][1] = 0.0, 1.0
    return found


def test_a_model_with_two_inputs_is_served_restarted_and_replayed(cli: Cli, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    asked = {name: one for name, one in make_task(99, weighted=True).items() if name not in ("query_y", "query_weight")}
    with running_daemon(config) as daemon:
        for t in range(7):
            assert daemon.post(encode(make_task(t, weighted=t % 3 == 2)), f"task-{t}").status_code == 201
        daemon.wait_until_learned(7)
        assert daemon.drain() == 0
        assert "Traceback" not in daemon.log.read_text()
    with running_daemon(config) as daemon:
        for t in range(7, ROUNDS):
            assert daemon.post(encode(make_task(t, weighted=t % 3 == 2)), f"task-{t}").status_code == 201
        daemon.wait_until_learned(ROUNDS)
        refused = daemon.post(encode({**make_task(0), "support_x.mask": torch.ones(6, 4)}))
        assert (refused.status_code, refused.json()["reason"]) == (422, "wrong_shape")

        def ask() -> httpx.Response | None:
            found = daemon.client.post("/v1/adapt", content=encode(asked))
            assert found.status_code == 200, found.text
            return found if found.headers["X-Online-Meta-Round"] == str(ROUNDS) else None

        answer = wait_for("the last leader answers", ask)
        served = decode_predictions(answer.content)
        wait_for("all is sealed", lambda: [*(tmp_path / "run/history/archive/markers").glob("*")])
        assert daemon.drain() == 0
        assert "Traceback" not in daemon.log.read_text()
    support, query_x = wire.decode_support(encode(asked), SPEC, Limits())
    expected, _ = adapt_from_checkpoint(tmp_path / f"run/checkpoints/{ROUNDS}", support, query_x)
    assert served["predictions"].shape == (4, 3)
    assert torch.equal(served["predictions"], load(encode_predictions(expected))["predictions"])
    assert verify(tmp_path / "run/history").clean
    with History.open(tmp_path / "run/history", write=False) as history:
        for t in range(ROUNDS):
            found = wire.decode(encode(make_task(t, weighted=t % 3 == 2)), SPEC, Limits())
            assert wire.encode(history[t]) == wire.encode(found)
    ask = ("replay", config, "--history", tmp_path / "run/history", "--out", tmp_path / "again")
    ended = cli(*ask)
    assert ended.code == 0, ended.err
    assert leader_hash(tmp_path / "again") == leader_hash(tmp_path / "run")
    assert [one["learners"] for one in lines(tmp_path / "again/rounds.jsonl")] == [
        one["learners"] for one in lines(tmp_path / "run/rounds.jsonl")
    ]
    assert {one["kind"] for one in lines(tmp_path / "again/comparators.jsonl")} == {"hindsight", "dynamic"}


def test_two_ranks_learn_the_same_bits_of_named_inputs_and_weights(cli: Cli, tmp_path: Path) -> None:
    """The run is played by two real ranks, and its replay by one process without ranks."""
    config = write_config(tmp_path)
    ranks = ("engine.kind=deepspeed", "engine.processes=2", "engine.deterministic=true", "engine.zero_stage=2")
    with running_daemon(config, "engine.batching=loop", *ranks) as daemon:
        for t in range(ROUNDS):
            assert daemon.post(encode(make_task(t, weighted=t % 3 == 2)), f"task-{t}").status_code == 201
        daemon.wait_until_learned(ROUNDS, seconds=200)
        assert daemon.drain() == 0
        assert "Traceback" not in daemon.log.read_text()
    assert len([*(tmp_path / f"run/checkpoints/{ROUNDS}").glob("ftml.*.safetensors")]) == 2, "each rank has a shard"
    config.write_text(f'{config.read_text()}\n[engine]\nbatching = "loop"\n')
    ended = cli("replay", config, "--history", tmp_path / "run/history", "--out", tmp_path / "again")
    assert ended.code == 0, ended.err
    assert leader_hash(tmp_path / "again") == leader_hash(tmp_path / "run")
    mine, theirs = (lines(tmp_path / name / "rounds.jsonl") for name in ("again", "run"))
    assert [one["learners"] for one in mine] == [one["learners"] for one in theirs]
