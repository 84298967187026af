"""The table of FTML next to its baselines, at a small size."""

from tests.experiments import first_table
from tests.experiments.common.playing import finish_replays


def test_the_first_table_is_made_of_replays(tmp_path, monkeypatch):
    small = first_table.Stream("sinusoid", "sinusoid.toml", 3, 2)
    monkeypatch.setattr(first_table, "STREAMS", {"sinusoid": small})
    replays = first_table.list_replays("sinusoid", [0, 1], tmp_path)
    quick = ("engine.batching=loop", "meta.steps_per_round=1", "meta.batch=1", "inner.steps=1")
    replays = [one._replace(overrides=(*one.overrides, *quick)) for one in replays if one.name != "reptile"]
    (entries,) = finish_replays({"sinusoid": replays}, 2).values()
    lines = [line for entry in entries for line in first_table.make_lines("sinusoid", entry)]
    assert [(line["variant"], line["seed"], line["rounds"]) for line in lines] == [
        ("exact", 0, 3),
        ("exact", 1, 3),
        ("first order", 0, 3),
        ("first order", 1, 3),
        ("full replay", 0, 2),
        ("uniform replay", 0, 2),
    ]
    assert [*lines[0]["learners"]] == ["ftml", "train_on_everything", "from_scratch"]
    assert [*lines[2]["learners"]] == ["ftml"]
    result = {"command": "c", "commit": "abc", "wall_seconds": 60.0, "runs": lines}
    rows = [line.split(" | ")[1:3] for line in first_table.render(result).splitlines() if line.startswith("| sinus")]
    assert rows == [
        ["FTML, exact", "3"],
        ["FTML, first order", "3"],
        ["FTML, full replay", "2"],
        ["FTML, uniform replay", "2"],
        ["from scratch", "3"],
        ["train on everything", "3"],
    ]
