import numpy as np
import pytest
import torch

from streams.formats import wire
from streams.sources import transformed_digits
from streams.sources.transformed_digits import SPEC, Settings, load_digits, make_task, transform
from streams.spec import Limits, TaskSpec

SETTINGS = Settings()


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    return load_digits()


def numbered_images() -> np.ndarray:
    """Images that identify themselves: class and index are in their first pixels."""
    images = np.zeros((10, 500, 28, 28), dtype=np.uint8)
    images[:, :, 0, 0] = np.arange(10)[:, None]
    images[:, :, 0, 1], images[:, :, 0, 2] = np.divmod(np.arange(500), 250)
    return images


def identical_images() -> np.ndarray:
    """Identical images without a symmetry, small enough to stay within the frame."""
    image = np.zeros((28, 28), dtype=np.uint8)
    image[9:19, 11], image[9, 11:18] = 255, 160
    return np.broadcast_to(image, (10, 500, 28, 28)).copy()


def test_a_task_is_a_pure_function_of_seed_and_number(digits: np.ndarray) -> None:
    task, again, other = (make_task(digits, SETTINGS, seed, 70) for seed in (1, 1, 2))
    assert wire.encode(task) == wire.encode(again) != wire.encode(other)
    assert wire.encode(wire.decode(wire.encode(task), SPEC, Limits())) == wire.encode(task)
    assert task.support.x.shape == (60, 28, 28)
    assert task.query.x.shape == (10, 28, 28)
    assert task.support.x.dtype == torch.uint8
    assert task.support.y.tolist() == 6 * list(range(10)), "every ten images contain each class equally often"
    assert task.query.y.tolist() == list(range(10))


def test_no_image_repeats_before_all_images_were_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformed_digits, "transform", lambda images, seed, t: images)
    tasks = [make_task(numbered_images(), SETTINGS, 5, t) for t in range(500 // 7)]
    seen = []
    for task in tasks:
        for batch in task:
            label, high, low = (batch.x[:, 0, column].long() for column in range(3))
            assert torch.equal(label, batch.y)
            seen += list(zip(label.tolist(), (high * 250 + low).tolist(), strict=True))
    assert len(seen) == len(set(seen)) == 71 * 70


def test_a_task_uses_one_transformation_and_tasks_differ() -> None:
    shown = []
    for t in range(40):
        images = torch.cat([batch.x for batch in make_task(identical_images(), SETTINGS, 3, t)])
        assert (images == images[0]).all()
        shown.append(images[0])
    assert len({image.numpy().tobytes() for image in shown}) == 40
    inverted = [image for image in shown if image[0, 0] == 255]
    assert 10 < len(inverted) < 30
    assert all(image[0, 0] in (0, 255) for image in shown)
    assert {image.numpy().tobytes() for image in shown} != {
        make_task(identical_images(), SETTINGS, 4, t).query.x[0].numpy().tobytes() for t in range(40)
    }


def test_a_transformation_is_affine() -> None:
    """Three collinear points stay collinear, and the middle one stays in the middle. A fourth may change sides."""
    dots = torch.zeros(4, 28, 28, dtype=torch.uint8)
    for dot, (down, right) in zip(dots, ((13, 10), (13, 14), (13, 18), (18, 14)), strict=True):
        dot[down - 1 : down + 2, right - 1 : right + 2] = 255
    sides = []
    for t in range(60):
        ink = transform(dots, 7, t).double()
        ink = 255 - ink if ink[0, 0, 0] else ink
        sums = ink.sum((1, 2))
        assert torch.allclose(sums, sums.mean(), rtol=0.15), "the ink changes only with the area"
        centres = torch.stack([(ink.sum(other) * torch.arange(28.0)).sum(1) / sums for other in (2, 1)], dim=1)
        assert torch.allclose(centres[1], (centres[0] + centres[2]) / 2, atol=0.4)
        (down, right), (aside_down, aside_right) = (
            (centres[2] - centres[0]).tolist(),
            (centres[3] - centres[1]).tolist(),
        )
        sides.append((down > 0, right > 0, down * aside_right > right * aside_down))
    assert len(set(sides)) == 8, "rotated in every direction, flipped and not"


def test_the_source_refuses_other_runs_and_too_many_images() -> None:
    with pytest.raises(ValueError, match="ways = 10, but the run expects 5"):
        transformed_digits.create_source(SETTINGS, TaskSpec((28, 28), "uint8", "class", 5), "digits", 9)
    with pytest.raises(ValueError, match="501 images per class"):
        Settings(support_per_class=499, query_per_class=2)
