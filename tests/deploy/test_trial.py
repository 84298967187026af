"""A task that the model cannot process is refused at the door, whichever source brings it; see also tests/cases."""

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import httpx
import pytest
import torch
from fastapi import FastAPI
from safetensors.torch import save, save_file
from torch import Tensor, nn

from deploy.checks.preflight import check_learning, check_sources
from deploy.checks.trial import REPEATS, TaskTrial, make_trial
from deploy.config.config import Config, make_config
from deploy.exits import ConfigError
from deploy.leader import Adapter, adapt_from_checkpoint
from deploy.server.app import create_app
from online_meta.learners import MemoryReplayBuffer
from online_meta.types import Batch, Task
from streams.formats import wire
from streams.history.history import History
from streams.ingest.dead_letters import DeadLetters, read_letters
from streams.ingest.ingest import Ingest
from streams.sources import python
from streams.types import Rejected
from tests.support.ingesting import until
from trainers.build import build_answering_learner

MARK = 50.0
ERRORS: dict[str, Callable[[], BaseException]] = {
    "ValueError": lambda: ValueError("a marked task"),
    "AssertionError": lambda: AssertionError(),
    "KeyError": lambda: KeyError("x"),
    "StopIteration": lambda: StopIteration(),
    "RuntimeError": lambda: RuntimeError("first line\nsecond line"),
    "own": lambda: Unprintable(),
    "SystemExit": lambda: SystemExit(3),
    "KeyboardInterrupt": lambda: KeyboardInterrupt(),
}
FAULTS: dict[str, Callable[[], BaseException]] = {
    "MemoryError": lambda: MemoryError(),
    "OSError": lambda: OSError(5, "I/O error"),
    "allocation": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory"),
}
"""Exceptions that are due to the machine."""


class Unprintable(Exception):
    def __str__(self) -> str:
        raise TypeError("no text")


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Marked(nn.Module):
    """Raises an exception on an input above ``MARK``, and notes the threads that call it."""

    threads: ClassVar[set[str]] = set()

    def __init__(self, error: str) -> None:
        super().__init__()
        self.layer, self._make_error = nn.Linear(4, 3), {**ERRORS, **FAULTS}[error]

    def forward(self, x: Tensor) -> Tensor:
        Marked.threads.add(threading.current_thread().name)
        if not torch._C._functorch.is_functorch_wrapped_tensor(x) and float(x.max()) > MARK:
            raise self._make_error()
        result: Tensor = self.layer(x)
        return result


def marked(error: str = "ValueError") -> nn.Module:
    return Marked(error)


def words() -> nn.Module:
    return nn.Sequential(nn.Embedding(50, 8), Mean(), nn.Linear(8, 3))


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.ReLU(), nn.Linear(8, 3))


def pictures() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def make_batch(x: Tensor) -> Batch:
    return Batch(x, torch.arange(len(x)) % 3)


def make_task(support: Tensor, query: Tensor) -> Task:
    return Task(make_batch(support), make_batch(query))


GOOD = make_task(torch.ones(4, 4), torch.ones(2, 4))
BAD = make_task(torch.ones(4, 4), torch.full((2, 4), 2 * MARK))
MISFITS = {
    "a word past the vocabulary": ("words", {"x_shape": [6], "x_dtype": "int64"}, torch.ones(3, 6).long() * 49, 50),
    "one sample under batch norm": ("normalised", {"x_shape": [4]}, torch.ones(3, 4), 1),
    "an image smaller than the kernel": ("pictures", {"x_shape": [1, -1, -1]}, torch.ones(3, 1, 9, 9), 3),
}


def spoil(x: Tensor, number: int) -> Tensor:
    """Return the misfit: a larger word id, fewer samples or a smaller image."""
    if x.dtype == torch.int64:
        return torch.full_like(x, number)
    return x[:number] if x.ndim == 2 else x[:, :, :number, :number]


def configure(folder: Path, build: str = "marked", task: dict[str, Any] | None = None, **serve: Any) -> Config:
    name, _, error = build.partition("=")
    model = {"build": f"{__name__}:{name}", "args": {"error": error} if error else {}}
    raw = {"run": {"path": str(folder)}, "task": {**(task or {"x_shape": [4]}), "y": "class", "ways": 3}}
    serve = {"try_seconds": 60.0, **serve}  # whether the machine is busy must not decide
    return make_config({**raw, "model": model, "serve": serve, "regret": {"comparator": [], "baselines": []}}, "x")


class Door(NamedTuple):
    """A daemon's application and its ingest, without a trainer."""

    config: Config
    app: FastAPI
    ingest: Ingest
    history: History
    letters: Path

    def post(self, task: Task, id: str) -> Any:
        return self.send("/v1/tasks", wire.encode(task), {"Idempotency-Key": id})

    def send(self, path: str, body: bytes, headers: dict[str, str]) -> httpx.Response:
        headers |= {"Content-Type": "application/octet-stream"}

        async def post() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
                return await client.post(path, content=body, headers=headers)

        return asyncio.run(post())

    def adapt(self, task: Task) -> Any:
        tensors = {"support_x": task.support.x, "support_y": task.support.y, "query_x": task.query.x}
        return self.send("/v1/adapt", save(tensors), {})


@pytest.fixture
def open_door(tmp_path: Path) -> Iterator[Callable[..., Door]]:
    opened: list[tuple[Ingest, History]] = []

    def make(config: Config, rejected: Callable[[str, str], None] = lambda *said: None) -> Door:
        history = History.open(tmp_path / "history", write=True)
        trial = make_trial(config, check_learning(config))
        letters = DeadLetters(tmp_path / "letters", 10, 1 << 20)
        limits = config.serve.limits
        ingest = Ingest(
            *(history, config.task, limits, lambda: 0, rejected, lambda *said: None),
            dead_letters=letters,
            try_task=trial,
        )
        opened.append((ingest, history))
        leader = tmp_path / "leader.safetensors"
        weights = check_learning(config).start.weights
        save_file({name: value.contiguous() for name, value in weights.items()}, leader, {"round": "7"})
        state = SimpleNamespace(
            config=config, ingest=ingest, history=history, adapter=Adapter(config.trainer(), leader), token=None
        )
        return Door(config, create_app(state), ingest, history, tmp_path / "letters")

    yield make
    for ingest, history in opened:
        ingest.close()
        history.close()


@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("part", ["support", "query"])
def test_a_task_that_fits_the_configuration_but_not_the_model_is_refused(
    tmp_path: Path, open_door: Callable[..., Door], misfit: str, part: str
) -> None:
    build, task, x, number = MISFITS[misfit]
    door = open_door(configure(tmp_path, build, task))
    good, bad = make_task(x, x), make_task(*(spoil(x, number) if part == one else x for one in ("support", "query")))
    if x.ndim == 4:  # all samples of a task have one shape
        bad = make_task(spoil(x, number), spoil(x, number))
    assert door.post(good, "first").status_code == 201
    answer = door.post(bad, "bad")
    assert (answer.status_code, answer.json()["reason"]) == (422, "model_error")
    assert "the model does not accept the " in answer.json()["detail"]
    assert door.post(good, "last").json() == {"id": "last", "round": 1}
    ((_, letter),) = read_letters(door.letters)
    assert (letter["reason"], letter["id"]) == ("model_error", "bad")


@pytest.mark.parametrize("error", ERRORS)
def test_every_exception_of_the_model_is_a_refusal(tmp_path: Path, open_door: Callable[..., Door], error: str) -> None:
    door = open_door(configure(tmp_path, f"marked={error}"))
    for answer in (door.post(BAD, "bad"), door.adapt(BAD)):
        assert (answer.status_code, answer.json()["reason"]) == (422, "model_error")
        assert len(answer.json()["detail"]) < 500
    assert door.post(GOOD, "good").status_code == 201
    answer = door.adapt(GOOD)
    assert (answer.status_code, answer.headers["X-Online-Meta-Round"]) == (200, "7")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_machine_refuses_no_task(tmp_path: Path, open_door: Callable[..., Door], fault: str) -> None:
    door = open_door(configure(tmp_path, f"marked={fault}"))
    assert door.post(BAD, "bad").status_code == 201
    assert door.adapt(BAD).json()["reason"] == "model_error"


class Pair(nn.Module):
    """Returns two tensors, which no answer can hold; its loss takes the first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), x


def test_an_output_that_cannot_be_sent_is_a_refusal(tmp_path: Path) -> None:
    config = configure(tmp_path)
    adapter = Adapter(config.trainer(), tmp_path / "leader")
    adapter.predict = lambda support, query_x, samples: (Pair()(query_x), 3, None)  # type: ignore[assignment, return-value]
    with pytest.raises(Rejected, match="model_error"):
        adapter.answer(GOOD.support, GOOD.query.x)


def test_the_model_runs_outside_the_event_loop(tmp_path: Path, open_door: Callable[..., Door]) -> None:
    door = open_door(configure(tmp_path))
    Marked.threads.clear()
    assert door.post(GOOD, "good").status_code == 201
    assert Marked.threads
    assert threading.current_thread().name not in Marked.threads


def yield_tasks() -> Iterator[tuple[str, Task]]:
    yield "one", GOOD
    yield "bad", BAD
    yield "two", GOOD


def test_a_source_goes_on_after_a_task_that_the_model_refuses(tmp_path: Path, open_door: Callable[..., Door]) -> None:
    rejected: list[tuple[str, str]] = []
    door = open_door(configure(tmp_path, "marked=SystemExit"), lambda *said: rejected.append(said))
    source = python.create_source(python.Settings(f"{__name__}:yield_tasks"), door.config.task, "mine", 0)
    door.ingest.pull("mine", source)
    until(lambda: len(door.history) == 2)
    assert rejected == [("mine", "model_error")]
    assert [door.history.entry(round).id for round in range(2)] == ["one", "two"]
    ((body, letter),) = read_letters(door.letters)
    assert letter["reason"] == "model_error"
    assert body.read_bytes() == wire.encode(BAD)


def test_a_known_task_is_not_tried_again(tmp_path: Path, open_door: Callable[..., Door]) -> None:
    door = open_door(configure(tmp_path))
    door.history.append([])
    door.ingest._try_task = None
    assert door.post(BAD, "known").status_code == 201
    door.ingest._try_task = make_trial(door.config, check_learning(door.config))
    assert door.post(BAD, "known").status_code == 200


def test_trials_can_be_switched_off(tmp_path: Path, open_door: Callable[..., Door]) -> None:
    door = open_door(configure(tmp_path, try_tasks=False))
    assert door.post(BAD, "bad").status_code == 201


def test_slow_models_are_not_tried(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    config = configure(tmp_path, try_seconds=0.5)
    ticks = count(step=0.6)
    assert make_trial(config, check_learning(config), clock=lambda: next(ticks)) is None
    assert "tasks are not tried when they arrive: that takes 0.6 s; [serve] try_seconds is 0.5" in caplog.text


def test_tasks_that_would_take_long_are_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By this clock, a forward pass on the small task takes 0.1 s, and on one 16 times larger 1.6 s."""
    config = configure(tmp_path, try_seconds=1.0)
    monkeypatch.setattr("deploy.checks.trial.MEASURE_SECONDS", 100.0)
    times = iter([0.1] * (1 + REPEATS) + [1.6] * (1 + REPEATS))
    readings = iter([reading for spent in times for reading in (0.0, spent)])
    trial = make_trial(config, check_learning(config), clock=lambda: next(readings))
    assert isinstance(trial, TaskTrial)
    few, many = torch.full((2, 4), 2 * MARK), torch.full((60, 4), 2 * MARK)
    assert trial.cost.seconds(make_task(many, many)) == pytest.approx(0.1 + 1.5 / (15 * 32) * 480)
    with pytest.raises(Rejected, match="model_error"):
        trial(make_task(few, few))
    trial(make_task(many, many))


class NeedsDevice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("this kernel needs a GPU")


def test_a_model_that_does_not_run_on_the_cpu_is_not_tried(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = configure(tmp_path)
    context = check_learning(config)
    loss = dataclasses.replace(context.inner.loss, output=lambda params, x: NeedsDevice()(x))
    broken = dataclasses.replace(context, inner=dataclasses.replace(context.inner, loss=loss))
    assert make_trial(config, broken) is None
    assert "the model fails on the CPU: RuntimeError: this kernel needs a GPU" in caplog.text


def yield_a_bad_task() -> Iterator[tuple[str, Task]]:
    yield "bad", BAD


def test_the_check_tries_the_first_task_of_a_source(tmp_path: Path) -> None:
    raw = {"kind": "python", "iterator": f"{__name__}:yield_a_bad_task"}
    config = dataclasses.replace(configure(tmp_path), source=make_sources(tmp_path, raw))
    with pytest.raises(ConfigError, match="its task bad would be refused: model_error"):
        check_sources(config, make_trial(config, check_learning(config)))


def make_sources(folder: Path, *tables: dict[str, Any]) -> Any:
    raw: dict[str, Any] = {
        "run": {"path": str(folder)},
        "task": {"x_shape": [4], "ways": 3},
        "model": {"build": f"{__name__}:marked"},
    }
    return make_config({**raw, "source": [*tables]}, "x").source


def test_the_command_explains_every_exception_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(tmp_path, "marked=KeyError")
    saved = {"ftml": build_answering_learner(config.trainer(), MemoryReplayBuffer()).learner.save()}
    settings = dataclasses.asdict(config.trainer())
    checkpoint = SimpleNamespace(settings=settings, learners=saved, rounds=0)
    monkeypatch.setattr("deploy.leader.open_checkpoint", lambda folder: checkpoint)
    with pytest.raises(Exception, match="does not accept these tensors: KeyError: 'x'"):
        adapt_from_checkpoint(tmp_path, BAD.support, BAD.query.x)
