"""Rounds of a model with two inputs and weighted samples: what is left out, a restart and an archive change nothing."""

from pathlib import Path
from threading import Event

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.func import functional_call

from deploy.commands import adapt
from deploy.leader import adapt_from_checkpoint
from deploy.predictions import encode_predictions
from online_meta.batches import map_tensors, select_samples
from online_meta.batching.plan import signature_of
from online_meta.outcomes import outcome_of
from online_meta.prediction import mix, point
from online_meta.testing.learner_problems import frozen
from online_meta.types import Batch, Params, Task
from streams.formats import wire
from streams.history.history import History
from streams.history.sealing import SealingSettings, evict_payloads, seal_next
from streams.history.verify import verify
from streams.ingest.outliers import measure_scales
from tests.deploy.user_models import Finder, found
from tests.support.runs import SETTINGS, changed, fill, lines, opened, play
from trainers.distributed.ranks import RankGroup
from trainers.loop.rounds import play_rounds
from trainers.loop.task_prefetch import HistoryBuffer
from trainers.settings import ModelSettings, TrainerSettings

ROUNDS = 6
WAYS = 3


class MaskedMean(nn.Module):
    """The mean over the places where the mask is 1, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(12, 4), nn.Linear(4, WAYS)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        mask = mask[..., None]
        return self.head((torch.tanh(self.embedding(tokens)) * mask).sum(1) / mask.sum(1).clamp(min=1))


def masked_mean() -> nn.Module:
    return MaskedMean().double()


def settings(**inner: object) -> TrainerSettings:
    model = ModelSettings(f"{__name__}:masked_mean", {}, loss="cross_entropy")
    made = changed(SETTINGS, meta={"batch": 2}, inner={"steps": 2, **inner}, regret={"prefixes": (2,)})
    return made.__class__(**{**vars(made), "model": model})


def make_task(seed: int) -> Task:
    """Return a task whose samples have weights, some of them 0; what these samples hold is arbitrary."""
    random = torch.Generator().manual_seed(seed)

    def batch(n: int) -> Batch:
        tokens = torch.randint(12, (n, 5), generator=random)
        mask = (torch.arange(5) < torch.randint(1, 6, (n, 1), generator=random)).double()
        weight = 0.5 + torch.rand(n, generator=random)
        weight[n // 2 :: 2] = 0.0
        return Batch({"mask": mask, "tokens": tokens}, torch.randint(WAYS, (n,), generator=random), weight)

    return Task(batch(7), batch(5))


def leave_out(task: Task) -> Task:
    """Return the task without its samples of weight 0."""
    return Task(*(select_samples(batch, batch.weight > 0) for batch in task))


def open_filled(path: Path, tasks: list[Task]) -> History:
    history = History.open(path, write=True)
    fill(history, tasks)
    return history


def learn(folder: Path, history: History, chosen: TrainerSettings) -> dict[str, Params]:
    """Play all rounds; return the state of every learner."""
    with opened(folder, history, chosen) as run:
        assert play_rounds(run, Event(), ROUNDS) == ROUNDS
        return {name: learner.save() for name, learner in run.learners.items()}


@pytest.mark.parametrize("gradient", ["exact", "first_order", "reptile"])
def test_a_sample_of_weight_0_is_a_sample_that_is_left_out(tmp_path: Path, gradient: str) -> None:
    tasks, chosen = [make_task(t) for t in range(ROUNDS)], changed(settings(), meta={"gradient": gradient})
    with open_filled(tmp_path / "a", tasks) as whole, open_filled(tmp_path / "b", [*map(leave_out, tasks)]) as cut:
        assert wire.encode(whole[3]) == wire.encode(tasks[3])
        learned = learn(tmp_path / "whole", whole, chosen)
        right = learn(tmp_path / "cut", cut, chosen)
    assert learned.keys() == right.keys() == {"ftml", "train_on_everything", "from_scratch"}
    for learner in learned:
        assert learned[learner].keys() == right[learner].keys()
        for name, value in learned[learner].items():
            torch.testing.assert_close(value, right[learner][name], rtol=1e-9, atol=1e-11, msg=f"{learner} {name}")
    for one, other in zip(lines(tmp_path / "whole"), lines(tmp_path / "cut"), strict=True):
        assert one["accuracy"] == pytest.approx(other["accuracy"], abs=1e-12)
        assert one["loss_after"] == pytest.approx(other["loss_after"], rel=1e-9)
        assert one["learners"].keys() == other["learners"].keys()
        for name, score in one["learners"].items():
            assert score["nll"] == pytest.approx(other["learners"][name]["nll"], rel=1e-9)
            assert score["nll"] == pytest.approx(score["loss_after"], rel=1e-12)


def test_a_restart_and_an_archive_change_no_bit(tmp_path: Path) -> None:
    tasks = [
        make_task(t) if t % 3 else make_task(t)._replace(query=make_task(t).query._replace(weight=None))
        for t in range(ROUNDS)
    ]
    with open_filled(tmp_path / "a", tasks) as history:
        right = play(tmp_path / "at once", history, ROUNDS, settings())
        before = [history.payload(round) for round in range(ROUNDS)]
        play(tmp_path / "in two", history, 3, settings())
        sealing = SealingSettings(segment_rounds=4, ledger_bytes=0)
        assert [*iter(lambda: seal_next(history, sealing), None)]
        assert evict_payloads(history, 0)
        assert [history.payload(round) for round in range(ROUNDS)] == before
        assert list(history[1].support.x) == ["mask", "tokens"]
        assert play(tmp_path / "in two", history, ROUNDS, settings()) == right
        assert play(tmp_path / "replay", history, ROUNDS, settings()) == right
    assert verify(tmp_path / "a").clean
    assert lines(tmp_path / "replay") == lines(tmp_path / "at once")


def test_a_rank_without_storage_receives_named_inputs_and_weights(tmp_path: Path) -> None:
    tasks, sent = [make_task(t) for t in range(ROUNDS)], []
    with open_filled(tmp_path / "a", tasks) as history:
        group = RankGroup(0, 2, send=lambda payloads: sent.append(payloads) or [])
        HistoryBuffer(history, torch.device("cpu"), group).distribute([[0, 1], [5, 3]])
    remote = HistoryBuffer(None, torch.device("cpu"), RankGroup(1, 2, send=lambda _: sent[0][1]))
    remote.distribute([[0, 1], [5, 3]])
    for round in (5, 3):
        assert signature_of(remote[round]) == signature_of(tasks[round])
        assert wire.encode(remote[round]) == wire.encode(tasks[round])


def test_scales_are_those_of_all_inputs_and_of_the_samples_that_count() -> None:
    task = make_task(0)
    spoiled = map_tensors(torch.clone, task)
    for batch in spoiled:
        batch.x["mask"][batch.weight == 0] = 1e9
    assert measure_scales(spoiled) == measure_scales(task)
    counted = torch.cat([batch.x["mask"][batch.weight > 0] for batch in task])
    assert measure_scales(task).x == pytest.approx(float(counted.square().mean().sqrt()))
    assert measure_scales(task).y is None


def test_named_targets_are_scored_by_a_loss_of_ones_own(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)

    def batch(n: int) -> Batch:
        x = {"hint": torch.randn(n, 2, generator=random), "image": torch.randn(n, 3, generator=random)}
        y = {"box": torch.randn(n, 4, generator=random), "kind": torch.randint(3, (n,), generator=random)}
        return Batch(x, y, torch.rand(n, generator=random))

    model = ModelSettings("tests.deploy.user_models:Finder", {}, loss="tests.deploy.user_models:found")
    chosen = SETTINGS.__class__(**{**vars(SETTINGS), "model": model})
    tasks = [Task(batch(5), batch(3)) for _ in range(4)]
    with open_filled(tmp_path / "a", tasks) as history, opened(tmp_path / "run", history, chosen) as run:
        weights = {name: one.clone() for name, one in run.learners["ftml"].engine.meta().weights.items()}
        assert play_rounds(run, Event(), 4) == 4
    with torch.no_grad():
        output = functional_call(Finder(), weights, kwargs=tasks[0].query.x)
        rows, weight = found(output, tasks[0].query.y), tasks[0].query.weight
    first, *_ = lines(tmp_path / "run")
    assert first["loss_before"] == pytest.approx(float((rows * weight).sum() / weight.sum()), rel=1e-5)
    assert first["accuracy"] is None
    mixture = mix([point(outcome_of(found), one) for one in (output, double(output))], torch.tensor([0.5, 0.5]).log())
    torch.testing.assert_close(load(encode_predictions(mixture))["predictions.box"], 1.5 * output["box"])
    prediction, _ = adapt_from_checkpoint(tmp_path / "run/checkpoints/3", tasks[3].support, tasks[3].query.x)
    answer = load(encode_predictions(prediction))
    support, query = tmp_path / "support", tmp_path / "query"
    support.write_bytes(save(wire.name_fields("support", tasks[3].support)))
    query.write_bytes(save({f"query_x.{name}": one for name, one in tasks[3].query.x.items()}))
    folders = (
        "--support",
        support,
        "--query",
        query,
        "--checkpoint",
        tmp_path / "run/checkpoints/3",
        "--out",
        tmp_path / "out",
    )
    ended = CliRunner().invoke(adapt.command, [*map(str, folders)], catch_exceptions=False)
    assert ended.exit_code == 0
    assert frozen(load((tmp_path / "out").read_bytes())) == frozen(answer)
    assert {name: tuple(answer[name].shape) for name in answer if name.startswith("predictions")} == {
        "predictions.box": (3, 4),
        "predictions.kind": (3, 3),
    }


def double(output: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: 2 * one for name, one in output.items()}


def pixels() -> nn.Module:
    """Return the logits (n, 3, h, w) of a linear layer at each pixel."""
    return nn.Conv2d(1, WAYS, 1).double()


def test_entries_of_no_class_count_in_no_loss_and_no_metric(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)

    def batch(n: int) -> Batch:
        y = torch.randint(WAYS, (n, 4, 3), generator=random)
        y[torch.rand(n, 4, 3, generator=random) < 0.4] = -100
        return Batch(torch.randn(n, 1, 4, 3, generator=random, dtype=torch.float64), y)

    tasks = [Task(batch(5), batch(3)) for _ in range(3)]
    made = settings()
    model = ModelSettings(f"{__name__}:pixels", {}, loss="cross_entropy")
    chosen = changed(made.__class__(**{**vars(made), "model": model}), regret={"baselines": (), "prefixes": ()})
    with open_filled(tmp_path / "a", tasks) as history, opened(tmp_path / "run", history, chosen) as run:
        weights = {name: one.clone() for name, one in run.learners["ftml"].engine.meta().weights.items()}
        play_rounds(run, Event(), 3)
    layer = {name: one.requires_grad_() for name, one in weights.items()}

    def judge(batch: Batch) -> tuple[Tensor, float]:
        """Return the mean loss and the share of right classes, over the entries that have a class, one by one."""
        losses, right = [], []
        for image, classes in zip(batch.x, batch.y, strict=True):
            for i, j in ((i, j) for i in range(4) for j in range(3) if classes[i, j] >= 0):
                logits = layer["weight"][:, 0, 0, 0] * image[0, i, j] + layer["bias"]
                losses.append(-logits.log_softmax(0)[classes[i, j]])
                right.append(bool(logits.argmax() == classes[i, j]))
        return torch.stack(losses).mean(), sum(right) / len(right)

    before = judge(tasks[0].query)[0]
    for _ in range(chosen.inner.steps):
        grads = torch.autograd.grad(judge(tasks[0].support)[0], [*layer.values()])
        layer = {
            name: (one - chosen.inner.lr * grad).detach().requires_grad_()
            for (name, one), grad in zip(layer.items(), grads, strict=True)
        }
    loss, accuracy = judge(tasks[0].query)
    (first, *_) = lines(tmp_path / "run")
    assert first["loss_before"] == pytest.approx(float(before.detach()), rel=1e-9)
    assert first["loss_after"] == pytest.approx(float(loss.detach()), rel=1e-9)
    assert first["accuracy"] == pytest.approx(accuracy)
