"""The ranges of the inputs that a run has seen: which rows lie outside, and that a kill changes nothing."""

from pathlib import Path

import pytest
import torch

from deploy.leader import Adapter, adapt_from_checkpoint, read_leader
from deploy.predictions import decode_predictions
from online_meta.types import Batch, Task, Tensors
from streams.history.history import History
from tests.support.runs import SETTINGS, fill, kill, play, task
from trainers.checkpoint import load_checkpoint
from trainers.seen_inputs import MOST_FEATURES, SEEN, SeenInputs, decode_ranges, encode_ranges, find_outside


def seen_of(*inputs: Tensors, weight: torch.Tensor | None = None) -> SeenInputs:
    seen = SeenInputs()
    for x in inputs:
        seen.add(Task(Batch(x, torch.zeros(1), weight), Batch(x, torch.zeros(1), weight)))
    return seen


def outside(seen: SeenInputs, x: Tensors) -> list[bool]:
    return find_outside(decode_ranges(encode_ranges(seen)), x).tolist()


def test_a_vector_is_compared_entry_by_entry() -> None:
    seen = seen_of(torch.tensor([[0.0, 10.0], [1.0, 20.0]]), torch.tensor([[-1.0, 15.0]]))
    x = torch.tensor([[-1.0, 10.0], [1.0, 20.0], [1.1, 15.0], [0.0, 9.9], [10.0, 15.0]])
    assert outside(seen, x) == [False, False, True, True, True]


@pytest.mark.parametrize("shape", [(2, 2), (MOST_FEATURES + 1,)], ids=["images", "long vectors"])
def test_other_inputs_have_the_range_of_all_their_entries(shape: tuple[int, ...]) -> None:
    seen = seen_of(torch.linspace(0, 1, 2 * torch.Size(shape).numel()).reshape(2, *shape))
    assert outside(seen, torch.stack([torch.zeros(shape), torch.full(shape, 1.5)])) == [False, True]


def test_several_inputs_tokens_and_numbers_alone_have_ranges() -> None:
    seen = seen_of({"a": torch.tensor([0.0, 1.0]), "tokens": torch.tensor([[3, 9], [4, 5]])})
    x = {"a": torch.tensor([0.5, 0.5, 2.0]), "tokens": torch.tensor([[3, 9], [2, 5], [4, 5]])}
    assert outside(seen, x) == [False, True, True]


def test_padding_does_not_widen_a_range() -> None:
    x = torch.tensor([[1.0], [99.0]])
    assert outside(seen_of(x, weight=torch.tensor([1.0, 0.0])), x) == [False, True]


def test_without_ranges_nothing_is_marked() -> None:
    seen = SeenInputs()
    seen.load(None)
    seen.add(task(0))
    assert (encode_ranges(seen), seen.save()) == ("", {})
    assert outside(seen, torch.full((2, 1), 1e9)) == [False, False]
    masks = seen_of(torch.tensor([[True, False]]), torch.tensor([[1j]]))
    assert outside(masks, torch.tensor([[False, True]])) == [False]


def test_a_killed_run_has_the_ranges_of_one_that_was_not(tmp_path: Path) -> None:
    tasks = [task(seed, size=1.0 + seed) for seed in range(6)]
    found = []
    for name in ("whole", "killed"):
        history = History.open(tmp_path / name / "history", write=True)
        fill(history, tasks)
        if name == "killed":
            kill(tmp_path / name, history, updates=4)
        play(tmp_path / name, history, 6)
        history.close()
        checkpoint = load_checkpoint(tmp_path / name / "checkpoints/6")
        published = read_leader(tmp_path / name / "leader.safetensors").ranges
        assert torch.equal(published[""], checkpoint.learners[SEEN][""])
        found.append(published[""])
    assert torch.equal(*found)
    x = torch.cat([batch.x for one in tasks for batch in one if isinstance(batch.x, torch.Tensor)])
    assert torch.equal(found[0], torch.stack([x.amin(0), x.amax(0)]).double())


def test_an_answer_to_inputs_that_were_never_seen_is_marked(tmp_path: Path) -> None:
    history = History.open(tmp_path / "history", write=True)
    fill(history, [task(seed) for seed in range(3)])
    play(tmp_path, history, 3)
    history.close()
    support, query = task(0)
    assert isinstance(query.x, torch.Tensor)
    adapter = Adapter(SETTINGS, tmp_path / "leader.safetensors")
    assert "outside" not in decode_predictions(adapter.answer(support, query.x)[0])
    x = query.x.clone()
    x[1] = 1e6
    expected = [row == 1 for row in range(len(x))]
    assert decode_predictions(adapter.answer(support, x)[0])["outside"].tolist() == expected
    assert adapt_from_checkpoint(tmp_path / "checkpoints/3", support, x)[1].tolist() == expected
