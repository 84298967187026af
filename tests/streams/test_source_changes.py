"""Rows that are cut where the task changes, across restarts of the source."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from online_meta.testing.segmented import draw_classes, draw_lines
from streams.history.history import History
from streams.sources import samples
from streams.spec import TaskSpec
from streams.types import Arrival
from tests.support.ingesting import Open, until

REAL = TaskSpec(x_shape=(2,), y="real", y_shape=(1,))
LABELS = TaskSpec(x_shape=(2,), ways=3)
LENGTHS = [30, 22, 41, 35]
WAYS = [
    {"change": "run_length", "change_options": {"hypotheses": 10}},
    {"change": "loss_jump", "change_options": {"jump": 3.0}},
]
every_way = pytest.mark.parametrize("options", WAYS, ids=["run_length", "loss_jump"])
every_spec = pytest.mark.parametrize("spec", [REAL, LABELS], ids=["real", "labels"])


def lines(spec: TaskSpec, lengths: list[int] = LENGTHS, seed: int = 0) -> list[str]:
    drawn = draw_lines(seed, lengths) if spec is REAL else draw_classes(seed, lengths)
    return [json.dumps({"x": x.tolist(), "y": y.tolist()}) + "\n" for x, y in drawn]


def source(path: Path, spec: TaskSpec, **options: Any) -> Any:
    return samples.create_source(samples.Settings(str(path), ("x",), ("y",), **options), spec, "rows", 0)


def tasks(path: Path, spec: TaskSpec, after: str | None = None, **options: Any) -> list[Arrival]:
    opened = source(path, spec, **options)._replace(clock=lambda: 0.0)
    return list(iter(partial(next, opened.read(after)), None))


def ends(found: list[Arrival], text: list[str]) -> list[int]:
    """Return the row, counted from 1, at which each task ends."""
    sizes = [sum(map(len, text[:count])) for count in range(len(text) + 1)]
    return [sizes.index(int(arrival.cursor or 0)) for arrival in found]


@every_way
@every_spec
def test_a_task_ends_where_its_rows_change(tmp_path: Path, options: dict[str, Any], spec: TaskSpec) -> None:
    path, text = tmp_path / "rows.jsonl", lines(spec)
    path.write_text("".join(text))
    found = tasks(path, spec, **options)
    assert ends(found, text) == pytest.approx([30, 52, 93], abs=5), "the last task may still grow"
    begins = [0, *(arrival.cursor for arrival in found)]
    assert [arrival.id for arrival in found] == [f"rows-{begin}" for begin in begins[:-1]]
    whole = tasks(path, spec, **options, grows=False)
    assert whole[:-1] == found
    assert ends(whole, text)[-1] == sum(LENGTHS)


@every_way
@every_spec
def test_the_same_tasks_come_from_any_position_and_file_length(
    tmp_path: Path, options: dict[str, Any], spec: TaskSpec
) -> None:
    path, text = tmp_path / "rows.jsonl", lines(spec)
    path.write_text("".join(text))
    whole = tasks(path, spec, **options, most=40)
    assert len(whole) >= 3
    for at, arrival in enumerate(whole):
        assert tasks(path, spec, arrival.cursor, **options, most=40) == whole[at + 1 :]
    for count in range(20, len(text), 35):
        path.write_text("".join(text[:count]))
        first = tasks(path, spec, **options, most=40)
        path.write_text("".join(text))
        assert first + tasks(path, spec, first[-1].cursor if first else None, **options, most=40) == whole


def test_least_and_most_bound_the_rows_of_a_task(tmp_path: Path) -> None:
    path, text = tmp_path / "rows.jsonl", lines(REAL, [12, 30])
    path.write_text("".join(text))
    assert ends(tasks(path, REAL, change="run_length", most=20), text) == [12, 32]
    options = {"change": "run_length", "change_options": {"least": 13}}
    first, *_ = ends(tasks(path, REAL, **options), text)
    assert 13 <= first <= 16


@pytest.mark.parametrize(
    "bad", ["no json\n", '{"x": [1, 2]}\n', '{"x": [1, NaN], "y": [0]}\n', '{"x": [1], "y": [0]}\n']
)
def test_a_bad_row_refuses_its_task_and_shifts_no_cut(tmp_path: Path, bad: str) -> None:
    path, text = tmp_path / "rows.jsonl", lines(REAL)
    path.write_text("".join(text))
    (before, *_) = found = tasks(path, REAL, **WAYS[0])
    text[10:10] = [bad, bad]
    path.write_text("".join(text))
    again = tasks(path, REAL, **WAYS[0])
    assert ends(again, text) == [end + 2 for end in ends(found, [*text[:10], *text[12:]])]
    assert [arrival.body for arrival in again[1:]] == [arrival.body for arrival in found[1:]]
    assert (again[0].rejection is not None) == ("NaN" not in bad), "non-finite values are refused by the decoder"
    assert again[0].body != before.body


def test_an_invalid_label_is_hidden_from_the_detector(tmp_path: Path) -> None:
    path, text = tmp_path / "rows.jsonl", lines(LABELS)
    text[10:10] = ['{"x": [0, 0], "y": 3}\n', '{"x": [0, 0], "y": -1}\n']
    path.write_text("".join(text))
    assert ends(tasks(path, LABELS, **WAYS[0]), text) == pytest.approx([32, 54, 95], abs=3)


@every_way
def test_rows_become_rounds_once_across_restarts(
    tmp_path: Path, open_ingest: Open, faulty: History, options: dict[str, Any]
) -> None:
    path, text = tmp_path / "rows.jsonl", lines(LABELS)
    path.write_text("".join(text))
    expected = tasks(path, LABELS, **options)
    path.write_text("")
    for upto in (20, 33, 60, 90, len(text)):
        ingest = open_ingest()
        ingest.pull("rows", source(path, LABELS, **options, poll_seconds=0.01))
        path.write_text("".join(text[:upto]))
        so_far = len(tasks(path, LABELS, **options))
        until(lambda so_far=so_far: len(faulty) >= so_far)
        ingest.close()
    assert [faulty.entry(n).id for n in range(len(faulty))] == [arrival.id for arrival in expected]
    rows = [len(faulty[n].support.x) + len(faulty[n].query.x) for n in range(len(faulty))]
    assert rows == [b - a for a, b in zip([0, *ends(expected, text)], ends(expected, text), strict=False)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"change": "run_lenght"}, "did you mean 'run_length'"),
        ({"change_options": {"hazrd": 0.1}}, "change_options has no key 'hazrd': did you mean 'hazard'"),
        ({"change_options": {"hazard": 2.0}}, r"change_options.hazard = 2.0: Input should be less than 1"),
        ({"change_options": {"hazard": "x"}}, "change_options.hazard = 'x'"),
        ({"change_options": {"likelihood": 1}}, "no key 'likelihood'"),
        ({"likelihood": "lineer"}, "did you mean 'linear'"),
        ({"likelihood": "gaussian_classes"}, "is not for y = 'real'; 'linear' is"),
        ({"likelihood_options": {"inputs": 3}}, "likelihood_options has no key 'inputs'"),
        ({"likelihood_options": {"strength": 0}}, "likelihood_options.strength = 0"),
    ],
)
def test_a_wrong_name_or_option_is_reported_when_the_source_is_opened(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source(Path("rows.csv"), REAL, **{"change": "run_length", **options})


def test_samples_of_many_sizes_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="needs samples of one size"):
        source(Path("rows.csv"), TaskSpec(x_shape=(2, -1), ways=3), change="run_length")
