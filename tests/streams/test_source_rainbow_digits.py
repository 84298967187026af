from collections.abc import Iterator

import numpy as np
import pytest
import torch

from online_meta.types import Task
from streams.formats import wire
from streams.sources import rainbow_digits
from streams.sources._digits import COLOURS, TRANSFORMATIONS, paint
from streams.spec import Limits, TaskSpec
from streams.types import Arrival


def take(stream: Iterator[Arrival | None], n: int) -> list[Arrival]:
    return [one for one in (next(stream) for _ in range(n)) if one is not None]


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    return rainbow_digits.load_digits()


def test_the_digits_are_the_known_five_thousand(digits: np.ndarray) -> None:
    assert digits.shape == (10, 500, 28, 28)
    assert digits.dtype == np.uint8
    assert digits.max() == 255
    assert len(np.unique(digits.reshape(5000, -1), axis=0)) > 4_990
    middle, side = digits[:, :, 12:16, 12:16].mean(axis=(1, 2, 3)), digits[:, :, 12:16, 4:8].mean(axis=(1, 2, 3))
    assert middle[1] > 150 > 60 > middle[0], "a one has ink in the middle, a zero has none"
    assert side[0] > side[1]


def test_a_rainbow_task_is_a_pure_function_of_seed_and_number(digits: np.ndarray) -> None:
    task, again = (rainbow_digits.make_task(digits, 1, 60, 2, 3) for _ in range(2))
    assert wire.encode(task) == wire.encode(again)
    assert wire.encode(task) != wire.encode(rainbow_digits.make_task(digits, 2, 60, 2, 3))
    assert task.support.x.shape == (20, 3, 28, 28)
    assert task.query.x.shape == (30, 3, 28, 28)
    assert task.support.y.tolist() == [label for label in range(10) for _ in range(2)]
    assert wire.encode(wire.decode(wire.encode(task), rainbow_digits.SPEC, Limits())) == wire.encode(task)


def numbered_images() -> np.ndarray:
    """Images that identify themselves: class and index are in their first pixels."""
    images = np.zeros((10, 500, 28, 28), dtype=np.uint8)
    images[:, :, 0, 0] = np.arange(10)[:, None]
    images[:, :, 0, 1], images[:, :, 0, 2] = np.divmod(np.arange(500), 250)
    return images


def find_shown(t: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return (class, index) of each image that task t shows."""
    seen: list[np.ndarray] = []
    from streams.sources import _digits

    def look(images: np.ndarray, *how: int) -> np.ndarray:
        seen.append(images[:, 0, :3].astype(int))
        return paint(images, *how)

    monkeypatch.setattr(_digits, "paint", look)
    _digits.make_task(NUMBERED, 5, t, 3, 4)
    return [(int(a), int(b * 250 + c)) for a, b, c in seen[0]]


NUMBERED = numbered_images()


def test_a_pass_shows_no_image_twice_and_passes_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    a_pass = 500 // 7
    first = [find_shown(t, monkeypatch) for t in range(a_pass)]
    second = [find_shown(t, monkeypatch) for t in range(a_pass, 2 * a_pass)]
    for tasks in (first, second):
        images = [image for task in tasks for image in task]
        assert len(images) == len(set(images)) == a_pass * 70
        assert all([label for label, _ in task] == sorted(7 * list(range(10))) for task in tasks)
    assert first[0] != second[0]
    order = [[index for label, index in first[0] if label == digit] for digit in range(10)]
    assert len({tuple(indices) for indices in order}) == 10, "each class is shuffled on its own"


def test_every_transformation_comes_before_one_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    from streams.sources import _digits

    orders = [[_digits._transformation_of(4, t) for t in range(56 * k, 56 * (k + 1))] for k in range(3)]
    right = {(colour, scale, turns) for colour in range(7) for scale in (1, 2) for turns in range(4)}
    assert len(right) == TRANSFORMATIONS == 56
    assert all(set(order) == right and len(order) == 56 for order in orders)
    assert orders[0] != orders[1] != orders[2]


def test_an_image_is_a_white_digit_on_its_colour(digits: np.ndarray) -> None:
    three = digits[3, :5]
    for colour in range(7):
        plain = paint(three, colour, 1, 0)
        assert plain.shape == (5, 3, 28, 28)
        assert plain.dtype == np.uint8
        for channel in range(3):
            assert (plain[:, channel][three == 0] == COLOURS[colour][channel]).all()
            assert (plain[:, channel][three == 255] == 255).all()
    red = paint(three, 0, 1, 0)
    assert np.array_equal(red[:, 1], three), "on red, the green channel is the ink itself"
    for turns in range(4):
        assert np.array_equal(paint(three, 0, 1, turns)[:, 1], np.rot90(three, turns, axes=(1, 2)))
    half = paint(three, 0, 2, 0)[:, 1]
    assert (half[:, :7] == 0).all()
    assert (half[:, 21:] == 0).all()
    assert half[:, 7:21, 7:21].mean() == pytest.approx(three.mean(), abs=1.0)


def test_the_rainbow_source_streams_and_refuses_other_runs(digits: np.ndarray) -> None:
    source = rainbow_digits.create_source(rainbow_digits.Settings(tasks=60), rainbow_digits.SPEC, "digits", 9)
    stream = source.read("57")
    assert [one.id for one in take(stream, 2)] == ["digits-58", "digits-59"]
    assert next(stream) is None
    with pytest.raises(ValueError, match="ways = 10, but the run expects 5"):
        rainbow_digits.create_source(rainbow_digits.Settings(), TaskSpec((3, 28, 28), "uint8", "class", 5), "digits", 9)


def test_samples_come_in_random_order_unless_the_setting_says_otherwise(digits: np.ndarray) -> None:
    """Sorted by class, the first samples of a support set were all of class 0."""

    def read(shuffle: bool) -> list[Task]:
        settings = rainbow_digits.Settings(tasks=2, support_per_class=3, query_per_class=2, shuffle=shuffle)
        source = rainbow_digits.create_source(settings, rainbow_digits.SPEC, "digits", 9)
        return [wire.decode(one.body, rainbow_digits.SPEC, Limits()) for one in take(source.read(None), 2)]

    for t, (plain, mixed) in enumerate(zip(read(False), read(True), strict=True)):
        assert wire.encode(plain) == wire.encode(rainbow_digits.make_task(digits, 9, t, 3, 2)), "the order of 0.1.0"
        for sorted_batch, batch in zip(plain, mixed, strict=True):
            assert sorted(batch.y.tolist()) == sorted_batch.y.tolist() != batch.y.tolist()
            found = {(int(y), x.numpy().tobytes()) for x, y in zip(batch.x, batch.y, strict=True)}
            assert found == {(int(y), x.numpy().tobytes()) for x, y in zip(sorted_batch.x, sorted_batch.y, strict=True)}
    assert not torch.equal(read(True)[0].support.y, read(True)[1].support.y), "another order for each task"
