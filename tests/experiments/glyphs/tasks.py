"""Few-shot tasks of letters; whole scripts are held out, and each image is a new random distortion of a letter."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from online_meta.types import Batch, Task
from safetensors.torch import load_file, save_file
from tests.experiments.glyphs.fonts import MASTER, render_glyphs
from torch import Tensor
from torch.nn import functional as F

SIZE = 28
HELD_OUT = 4
"""Every fourth script, in shuffled order, is a test script; of the others, every fourth is a validation script."""


class Letters(NamedTuple):
    """Images of letters, one each: (letters, 56, 56) float32 in 0..1; ``train`` and ``test`` share no script.

    In a choice of settings, validation scripts, which are training scripts of the table, take the place of the test.
    """

    train: Tensor
    test: Tensor
    train_scripts: int
    test_scripts: int


def load_letters(fonts: Path, cache: Path, validation: bool = False) -> Letters:
    """Return the letters of Debian's Noto fonts; they are rendered once and saved in the file ``cache``.

    With ``validation``, those of the test scripts are left out: ``test`` are a quarter of the training scripts, and
    ``train`` the others.
    """
    if not cache.exists():
        glyphs = render_glyphs(fonts)
        cache.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"masters": torch.from_numpy(glyphs.masters), "script_of": torch.from_numpy(glyphs.script_of)}
        save_file(tensors, cache)
    saved = load_file(cache)
    pictures, script_of = saved["masters"].float() / 255, saved["script_of"]
    train, test = split_scripts(np.unique(script_of.numpy()), validation)
    of_train, of_test = (torch.isin(script_of, torch.from_numpy(scripts)) for scripts in (train, test))
    return Letters(pictures[of_train], pictures[of_test], len(train), len(test))


def split_scripts(scripts: NDArray[np.int64], validation: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the training and the test scripts, or the training and the validation scripts; always the same ones."""
    order = np.random.Generator(np.random.Philox(np.random.SeedSequence(0))).permutation(scripts)
    test = order[::HELD_OUT]
    train = np.setdiff1d(order, test, assume_unique=True)
    if validation:
        test = train[::HELD_OUT]
        train = np.setdiff1d(train, test, assume_unique=True)
    return train, test


def turn_letters(letters: Tensor, turns: int) -> Tensor:
    """Return the letters (n, 56, 56) turned by 0, ..., ``turns`` - 1 quarter turns: (turns n, 56, 56).

    A letter on its side counts as a letter of its own (Santoro et al., ICML 2016).
    """
    return torch.cat([torch.rot90(letters, turn, (1, 2)) for turn in range(turns)])


def draw_tasks(random: torch.Generator, letters: Tensor, tasks: int, ways: int, shots: int, queries: int) -> list[Task]:
    """Return tasks of ``ways`` letters: images (n, 1, 28, 28) in 0..1, labels (n,) in the order 0, 1, ..., 0, 1, ...

    ``shots`` and ``queries`` are numbers of images per letter; no two images are alike.
    """
    made = []
    for _ in range(tasks):
        chosen = letters[torch.randperm(len(letters), generator=random)[:ways]]
        images = draw_letters(random, chosen.repeat(shots + queries, 1, 1))
        labels = torch.arange(ways).repeat(shots + queries)
        cut = ways * shots
        made.append(Task(Batch(images[:cut], labels[:cut]), Batch(images[cut:], labels[cut:])))
    return made


def draw_letters(random: torch.Generator, masters: Tensor) -> Tensor:
    """Return a random distortion of each letter (rotation, scale, shear, shift, waves): (n, 1, 28, 28)."""
    count = len(masters)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=random)

    turn, slant = uniform(-0.3, 0.3), uniform(-0.25, 0.25)
    wide, high = uniform(0.8, 1.2), uniform(0.8, 1.2)
    rows = [
        torch.stack([turn.cos() * wide, -turn.sin() * high + slant, uniform(-0.12, 0.12)], 1),
        torch.stack([turn.sin() * wide, turn.cos() * high, uniform(-0.12, 0.12)], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), [count, 1, SIZE, SIZE], align_corners=False)
    # Two slow waves per image, one along each axis, with random phases.
    phase = uniform(0, 2 * math.pi, 2, 1, 1)
    size = uniform(0.0, 0.07, 2, 1, 1)
    x, y = grid[..., 0], grid[..., 1]
    bent = torch.stack([x + size[:, 0] * (3 * y + phase[:, 0]).sin(), y + size[:, 1] * (3 * x + phase[:, 1]).sin()], -1)
    assert masters.shape[1:] == (MASTER, MASTER)
    return F.grid_sample(masters.unsqueeze(1), bent, align_corners=False)
