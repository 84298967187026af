"""A run continues with another number of ranks, ZeRO stage or engine, with the same bits."""

import json

import pytest

from tests.recovery.test_ranks import feed, settle
from tests.support.daemon import RestartedDaemon

RANKS = """
[engine]
kind = "deepspeed"
batching = "loop"
deterministic = true
"""
WORLD_SIZES_AND_STAGES = ((1, 0), (2, 3), (4, 1))
"""The number of ranks and the ZeRO stage of each start."""


@pytest.mark.timeout(300)
def test_any_number_of_ranks_at_any_stage_continues_a_run(tmp_path):
    alone = RestartedDaemon(tmp_path / "alone", more='\n[engine]\nbatching = "loop"\n')
    try:
        feed(alone, 0, 5 * len(WORLD_SIZES_AND_STAGES))
        settle(alone, 5 * len(WORLD_SIZES_AND_STAGES))
        assert alone.drain() == 0
    finally:
        alone.process.kill()
        alone.process.wait()
    shards = []
    for number, (processes, stage) in enumerate(WORLD_SIZES_AND_STAGES):
        overrides = (f"engine.processes={processes}", f"engine.zero_stage={stage}")
        served = RestartedDaemon(tmp_path / "ranks", more=RANKS, overrides=overrides)
        try:
            feed(served, 5 * number, 5 * number + 5)
            settle(served, 5 * number + 5)
            assert served.drain() == 0
        finally:
            served.process.kill()
            served.process.wait()
        newest = served.run / "checkpoints" / str(5 * number + 5)
        shards.append(len(list(newest.glob("ftml.*.safetensors"))))
    assert shards == [processes for processes, _ in WORLD_SIZES_AND_STAGES], "each rank writes its own shard"
    assert served.hash() == alone.hash()
    lines = [json.loads(line) for line in (served.run / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == list(range(5 * len(WORLD_SIZES_AND_STAGES)))
