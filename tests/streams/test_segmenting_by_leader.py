"""Rows that are cut into tasks by the loss of the run's own leader."""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, count, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deploy.checks.preflight import open_sources
from deploy.config.config import make_config
from deploy.exits import ConfigError
from online_meta.answers import answer_by_inner_loop, believe_by_inner_loop, bind_meta, pack_meta, unpack_meta
from online_meta.changepoints.detectors.run_length import run_length
from online_meta.changepoints.leader_likelihood import leader_likelihood
from online_meta.changepoints.segments import Segmenter, segment_adaptively
from online_meta.changepoints.task_free import estimate_errors, make_task
from online_meta.functional.model import model_loss
from online_meta.inner import Inner
from online_meta.regret.scoring import score_task
from online_meta.rules.sgd import sgd
from online_meta.testing.segmented import draw_classes, draw_lines
from online_meta.types import Batch, Belief, Meta, Prediction, Score, State, Task, Tensors
from streams.segmenting.by_leader import LeaderContext, NeedsLeader
from streams.sources import samples
from streams.spec import TaskSpec
from streams.types import Arrival, TaskSource
from tests.support.ingesting import Counts, Faulty, Open, until

REAL = TaskSpec(x_shape=(2,), y="real", y_shape=(1,))
LABELS = TaskSpec(x_shape=(2,), ways=3)
LENGTHS = [30, 22, 41, 35, 28]
OPTIONS: dict[str, Any] = {"change": "run_length", "change_options": {"hypotheses": 4, "least": 10}}
JUMP: dict[str, Any] = {"change": "loss_jump", "change_options": {"jump": 3.0}}
every_spec = pytest.mark.parametrize("spec", [REAL, LABELS], ids=["real", "labels"])


@pytest.fixture
def spec() -> TaskSpec:
    return REAL


@dataclass
class Run:
    """A linear leader that starts at zero, and the rounds that it counts as learned."""

    spec: TaskSpec = REAL
    offset: float = 0.0
    steps: int = 10
    learned: int = 0
    rounds: int = 0
    last: Sequence[Task] = ()
    served_offsets: list[float] = field(default_factory=list)

    @property
    def inner(self) -> Inner:
        real = self.spec is REAL
        return Inner(
            model_loss(nn.Linear(2, 1 if real else 3), "mse" if real else "cross_entropy"), sgd(0.3), self.steps
        )

    def meta(self) -> Meta:
        outputs = 1 if self.spec is REAL else 3
        return self.inner.init({"weight": torch.zeros(outputs, 2), "bias": torch.full((outputs,), self.offset)})

    def latest_leader(self) -> tuple[State, int]:
        self.served_offsets.append(self.offset)
        return pack_meta(self.meta()), self.learned

    def answers(self, state: State, support: Batch, x: Tensors) -> dict[str, Prediction]:
        return answer_by_inner_loop(self.inner, unpack_meta(state), support, x)

    def believe(self, state: State, support: Batch) -> Belief:
        return believe_by_inner_loop(self.inner, unpack_meta(state), support)[""]

    def leader_context(self) -> LeaderContext:
        squares = self.spec is REAL
        return LeaderContext(
            self.answers,
            self.believe,
            self.inner.loss,
            squares,
            self.latest_leader,
            lambda: self.rounds,
            lambda many: self.last[-many:],
        )


def drawn(spec: TaskSpec) -> list[tuple[Tensor, Tensor]]:
    return draw_lines(0, LENGTHS) if spec is REAL else draw_classes(0, LENGTHS)


def write(path: Path, spec: TaskSpec) -> list[str]:
    text = [json.dumps({"x": x.tolist(), "y": y.tolist()}) + "\n" for x, y in drawn(spec)]
    path.write_text("".join(text))
    return text


def follow(path: Path, run: Run, **options: Any) -> Any:
    settings = samples.Settings(str(path), ("x",), ("y",), likelihood="leader", **{"grows": False, **options})
    needs_leader = samples.create_source(settings, run.spec, "rows", 0)
    assert isinstance(needs_leader, NeedsLeader)
    return needs_leader.create(run.leader_context())


def tasks(source: Any, after: str | None = None) -> list[Arrival]:
    """Return all tasks of the source, acknowledging each at once."""
    found = []
    for arrival in source.read(after):
        if arrival is None:
            return found
        found.append(arrival)
        source.ack([arrival._replace(body=b"")])
    return found


def ends(found: list[Arrival], text: list[str]) -> list[int]:
    """Return the row, counted from 1, at which each task ends."""
    sizes = [0, *accumulate(map(len, text))]
    return [sizes.index(int(arrival.cursor or 0)) for arrival in found]


@every_spec
def test_a_task_ends_where_the_leader_errs(tmp_path: Path, spec: TaskSpec) -> None:
    text = write(tmp_path / "rows.jsonl", spec)
    cut_by = partial(follow, tmp_path / "rows.jsonl", **(JUMP if spec is REAL else OPTIONS))
    true = [*accumulate(LENGTHS)]
    found = ends(tasks(cut_by(Run(spec))), text)
    near = [any(abs(end - one) <= 4 for one in found) for end in true]
    assert sum(near) >= 4
    assert len(found) <= 2 * len(true)
    assert ends(tasks(cut_by(Run(spec, steps=1, offset=40.0 if spec is REAL else 0.0))), text) != found, (
        "the cuts must depend on the leader"
    )


def cut_in_memory(run: Run, spec: TaskSpec, known: list[Score], **options: Any) -> list[int]:
    """Return where the same leader cuts the stream in memory, as in a notebook."""
    stream, scores = drawn(spec), list(known)

    def renew() -> Segmenter:
        errors = estimate_errors(scores[-3:]) if spec is REAL else None
        believe = bind_meta(run.inner, run.meta())
        return run_length(leader_likelihood(believe, run.inner.loss, *stream[0], errors=errors), **options)

    found = []
    for segment in segment_adaptively(renew, stream, 1_000):
        found.append(segment.end)
        if (task := make_task(stream[segment.begin : segment.end])) is not None:
            scores.append(score_task(run.inner, run.meta(), task, (1, 2, 5, 10)))
    return found


@every_spec
def test_a_file_is_cut_as_in_memory(tmp_path: Path, spec: TaskSpec) -> None:
    text = write(tmp_path / "rows.jsonl", spec)
    found = tasks(follow(tmp_path / "rows.jsonl", Run(spec), **OPTIONS, likelihood_options={"window": 3}))
    assert ends(found, text) == cut_in_memory(Run(spec), spec, [], **OPTIONS["change_options"])


def test_expected_errors_start_from_the_last_rounds(tmp_path: Path) -> None:
    text = write(tmp_path / "rows.jsonl", REAL)
    x, y = (torch.stack([pair[half] for pair in drawn(REAL)[:30]]) for half in (0, 1))
    known = [Task(Batch(x[:size], y[:size]), Batch(x[15:], 20 * y[15:])) for size in (15, 7, 2, 12)]
    options = {**OPTIONS, "likelihood_options": {"window": 3}}
    found = ends(tasks(follow(tmp_path / "rows.jsonl", Run(last=known), **options)), text)
    run, scores = Run(), []
    for task, size in zip(known[1:], (5, 2, 10), strict=True):
        shorter = Task(Batch(task.support.x[:size], task.support.y[:size]), task.query)
        scores.append(score_task(run.inner, run.meta(), shorter, (1, 2, 5, 10)))
    assert found == cut_in_memory(run, REAL, scores, **OPTIONS["change_options"])
    assert found != ends(tasks(follow(tmp_path / "rows.jsonl", Run(), **options)), text), (
        "the expected errors must matter"
    )


def test_a_task_starts_with_the_leader_that_learned_the_tasks_before(tmp_path: Path) -> None:
    text = write(tmp_path / "rows.jsonl", REAL)
    run = Run()
    source = follow(tmp_path / "rows.jsonl", run, **JUMP)
    stream = source.read(None)
    first = next(stream)
    assert [next(stream) for _ in range(3)] == [None] * 3, "the first task is not durable yet"
    source.ack([first])
    run.rounds = 1
    assert [next(stream) for _ in range(3)] == [None] * 3, "the first task is not learned yet"
    run.learned, run.offset = 1, 1e4
    second = next(stream)
    assert run.served_offsets[-1] == 1e4
    straight = tasks(follow(tmp_path / "rows.jsonl", Run(), **JUMP))
    assert [first] == straight[:1]
    assert ends([second], text) != ends(straight[1:2], text), "another leader must cut differently"


class InterruptedSource:
    """A source that fails after each task and is then read with another leader."""

    def __init__(self, path: Path, run: Run) -> None:
        self.path, self.run, self.reads = path, run, count()

    def read(self, after: str | None) -> Iterator[Arrival | None]:
        self.run.offset = 1e4 * next(self.reads)
        arrival = next(follow(self.path, self.run, **JUMP).read(after))
        yield arrival
        if arrival is not None:
            raise ConnectionError("it broke off")


def rows_of(history: Faulty) -> list[int]:
    return [len(history[n].support.x) + len(history[n].query.x) for n in range(len(history))]


def assert_each_row_is_stored_once(history: Faulty, text: list[str]) -> None:
    sizes = [0, *accumulate(map(len, text))]
    begins = [sizes.index(int(history.entry(n).id.removeprefix("rows-"))) for n in range(len(history))]
    assert [end - begin for begin, end in pairwise([*begins, len(text)])] == rows_of(history)
    assert sum(rows_of(history)) == len(text)


def test_rows_of_a_pending_task_are_not_cut_again(tmp_path: Path, open_ingest: Open, faulty: Faulty) -> None:
    text = write(tmp_path / "rows.jsonl", REAL)
    faulty.gate = threading.Event()
    timer = threading.Timer(1.5, faulty.gate.set)
    timer.start()
    ingest = open_ingest()
    ingest.pull("rows", InterruptedSource(tmp_path / "rows.jsonl", Run()))
    until(lambda: sum(rows_of(faulty)) >= len(text))
    ingest.close()
    assert_each_row_is_stored_once(faulty, text)


def test_each_row_is_in_one_round_across_restarts(tmp_path: Path, open_ingest: Open, faulty: Faulty) -> None:
    text = write(tmp_path / "rows.jsonl", REAL)
    for restart, offset in enumerate((0.0, 1e4, -300.0)):
        run = Run(offset=offset, learned=1_000)
        ingest = open_ingest()
        ingest.pull("rows", follow(tmp_path / "rows.jsonl", run, **JUMP, most=25))
        until(lambda least=restart + 1: len(faulty) >= least)
        if restart == 2:
            until(lambda: sum(rows_of(faulty)) >= len(text))
        ingest.close()
    assert_each_row_is_stored_once(faulty, text)


class Picky(nn.Module):
    """A linear layer that raises ``error`` where ``refuses`` is true of its inputs."""

    def __init__(self, refuses: Callable[[Tensor], bool], error: BaseException) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.refuses, self.error = refuses, error

    def forward(self, x: Tensor) -> Tensor:
        if self.refuses(x):
            raise self.error
        y: Tensor = self.layer(x)
        return y


def picky_context(run: Run, module: nn.Module) -> LeaderContext:
    inner = replace(run.inner, loss=model_loss(module, "mse"))
    meta = inner.init({name: torch.zeros_like(value) for name, value in module.named_parameters()})
    return leading_context(run, inner, meta)


def leading_context(run: Run, inner: Inner, meta: Meta) -> LeaderContext:
    """Return the context of the run with another leader."""
    return run.leader_context()._replace(
        answers=lambda state, support, x: answer_by_inner_loop(inner, unpack_meta(state), support, x),
        believe=lambda state, support: bind_meta(inner, unpack_meta(state))(support),
        loss=inner.loss,
        latest_leader=lambda: (pack_meta(meta), run.learned),
    )


def follow_picky(path: Path, run: Run, refuses: Callable[[Tensor], bool], error: BaseException) -> TaskSource:
    settings = samples.Settings(str(path), ("x",), ("y",), likelihood="leader", grows=False, **JUMP)
    needs_leader = samples.create_source(settings, REAL, "rows", 0)
    assert isinstance(needs_leader, NeedsLeader)
    return needs_leader.create(picky_context(run, Picky(refuses, error)))


MARK = 77.0
"""The first input of marked rows."""


def write_marked(path: Path, *marked: int) -> list[str]:
    text = [
        json.dumps({"x": [MARK, 0.0] if number in marked else x.tolist(), "y": y.tolist()}) + "\n"
        for number, (x, y) in enumerate(drawn(REAL))
    ]
    path.write_text("".join(text))
    return text


def has_mark(x: Tensor) -> bool:
    return bool((x == MARK).any())


MARKED = (0, 12, 60, 61, 155)


@pytest.mark.parametrize("error", [IndexError("index out of range"), SystemExit(3)], ids=["IndexError", "SystemExit"])
def test_a_row_on_which_the_model_fails_is_rejected_and_the_source_continues(
    tmp_path: Path,
    open_ingest: Open,
    faulty: Faulty,
    counts: Counts,
    caplog: pytest.LogCaptureFixture,
    error: BaseException,
) -> None:
    text = write_marked(tmp_path / "rows.jsonl", *MARKED)
    ingest = open_ingest()
    ingest.pull("rows", follow_picky(tmp_path / "rows.jsonl", Run(learned=1_000), has_mark, error))
    until(lambda: sum(rows_of(faulty)) >= len(text) - len(MARKED) and len(counts.rejected) >= len(MARKED))
    ingest.close()
    assert counts.rejected == [("rows", "model_error")] * len(MARKED)
    assert sum(rows_of(faulty)) == len(text) - len(MARKED)
    assert not any(has_mark(x) for n in range(len(faulty)) for x in (faulty[n].support.x, faulty[n].query.x))
    begins = [sum(map(len, text[:row])) for row in MARKED]
    assert f"the model fails on the row at {begins[1]}: {type(error).__name__}: {error}" in caplog.text
    assert f"a task ends before the row at {begins[1]}, on which the model fails" in caplog.text
    assert "cannot be read" not in caplog.text


def test_rows_on_which_the_model_fails_together_become_several_tasks(
    tmp_path: Path, open_ingest: Open, faulty: Faulty, counts: Counts
) -> None:
    text = write(tmp_path / "rows.jsonl", REAL)[:40]
    (tmp_path / "rows.jsonl").write_text("".join(text))
    ingest = open_ingest()
    adapts_to_five = lambda x: len(x) == 5  # noqa: E731
    ingest.pull("rows", follow_picky(tmp_path / "rows.jsonl", Run(learned=1_000), adapts_to_five, ValueError("five")))
    until(lambda: sum(rows_of(faulty)) >= len(text))
    ingest.close()
    assert_each_row_is_stored_once(faulty, text)
    assert max(rows_of(faulty)) == 4
    assert counts.rejected == []


def test_earlier_tasks_on_which_the_model_fails_have_no_score(tmp_path: Path) -> None:
    write_marked(tmp_path / "rows.jsonl")
    known = [Task(Batch(torch.full((4, 2), MARK), torch.ones(4, 1)), Batch(torch.ones(4, 2), torch.ones(4, 1)))]
    source = follow_picky(tmp_path / "rows.jsonl", Run(last=known), has_mark, ValueError("marked"))
    assert tasks(source) == tasks(follow(tmp_path / "rows.jsonl", Run(), **JUMP))


def test_an_error_of_the_machine_rejects_no_row(tmp_path: Path) -> None:
    write_marked(tmp_path / "rows.jsonl", 12)
    source = follow_picky(tmp_path / "rows.jsonl", Run(learned=1_000), has_mark, MemoryError())
    with pytest.raises(MemoryError):
        list(source.read(None))


class NeedsTwoSamples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 1:
            raise RuntimeError("it needs two samples or more")
        y: Tensor = self.layer(x)
        return y


def test_a_model_that_cannot_score_one_sample_is_reported_at_once(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", REAL)
    run = Run()
    module = NeedsTwoSamples()
    inner = replace(run.inner, loss=model_loss(module, "mse"))
    meta = inner.init(dict(module.named_parameters()))
    leader = leading_context(run, inner, meta)
    opened = samples.create_source(
        samples.Settings("x.jsonl", ("x",), ("y",), **JUMP, likelihood="leader"), REAL, "rows", 0
    )
    assert isinstance(opened, NeedsLeader)
    with pytest.raises(ValueError, match="cannot score single samples: RuntimeError: it needs two samples"):
        opened.create(leader)


CONFIG: dict[str, Any] = {
    "run": {"path": "x"},
    "task": {"x_shape": [2], "y": "real", "y_shape": [1]},
    "model": {"build": "trainers.models:mlp", "args": {"inputs": 2, "outputs": 1}, "loss": "mse"},
}
LINE = {"kind": "python", "iterator": "tests.support.feeds:pairs", "likelihood": "leader"}


def open_configured(**more: Any) -> Any:
    return open_sources(make_config({**CONFIG, "source": [{**LINE, **more}]}, "here"))["python"]


def test_the_configuration_selects_the_leader_likelihood(tmp_path: Path) -> None:
    stream = open_configured(**OPTIONS, likelihood_options={"sizes": [1, 4], "shape": 2.0}, most=30).read(None)
    first = next(item for item in stream if item)
    assert first.id == "python-0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"likelihood_options": {"windw": 3}}, "likelihood_options has no key 'windw': did you mean 'window'"),
        ({"likelihood_options": {"window": 0}}, "likelihood_options.window = 0"),
        ({"likelihood_options": {"sizes": []}}, "likelihood_options.sizes"),
        ({"likelihood_options": {"sizes": [0]}}, "likelihood_options.sizes"),
        ({"likelihood_options": {"sizes": [5, 2]}}, "they must ascend"),
        ({"likelihood_options": {"shape": 0.0}}, "likelihood_options.shape = 0.0"),
        ({"change_options": {"hazrd": 1}}, "change_options has no key 'hazrd'"),
        ({"likelihood": "leeder"}, "did you mean 'leader'"),
    ],
)
def test_a_wrong_option_is_reported_before_a_row_is_read(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_configured(**{"change": "run_length", **options})
