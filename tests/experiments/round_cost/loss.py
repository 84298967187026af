"""Compare the cumulative loss of bounded replay policies with that of full replay, seed by seed."""

import time
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from deploy.commands.replay import replay
from deploy.config.config import read_config
from online_meta.regret.ledger import MAIN_LEARNER
from tests.experiments.common.histories import make_history
from tests.experiments.common.tables import Row, load_row, mean_and_error, read_commit, save_row
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d
from trainers.models import mlp

HIDDEN = (64, 64)
POLICIES: dict[str, tuple[str, ...]] = {
    "all": ("meta.replay=all",),
    "uniform": ("meta.replay=uniform",),
    "stratified": ("meta.replay=stratified",),
    "recent": ("meta.replay=recent",),
    "reservoir": ("meta.replay=reservoir",),
    "prioritised": ("meta.replay=prioritised",),
    "prioritised by loss": ("meta.replay=prioritised", 'meta.replay_options={by="loss", exponent=0.6}'),
    "coreset": ("meta.replay=coreset",),
}
"""Every policy, with its own defaults, and the overrides that select it."""

COSTLIER: dict[str, tuple[str, tuple[str, ...]]] = {
    "stratified, 100 tasks a step": ("stratified", ("meta.batch=100",)),
    "stratified, 4 steps a round": ("stratified", ("meta.steps_per_round=4",)),
}
"""Variants with four times the meta-gradients per round: the policy, and the overrides."""

LABELS = (*POLICIES, *COSTLIER)
COMMON = (
    "model.build=tests.experiments.round_cost.loss:digits_mlp",
    "model.args={}",
    "inner.lr=0.1",
    "meta.steps_per_round=1",
    "meta.batch=25",
    "engine.batching=traced",
    "regret.comparator=[]",
    "regret.baselines=[]",
)


class Halved(nn.Module):
    """Halve the side of images before they enter a network."""

    def __init__(self, network: nn.Module) -> None:
        """Wrap ``network``, which gets images in -0.5..0.5."""
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Map images (n, 3, 28, 28) of 0..255 to logits (n, 10)."""
        shades = images.to(next(self.network.parameters()).dtype) / 255
        logits: Tensor = self.network(avg_pool2d(shades - 0.5, 2))
        return logits


def digits_mlp() -> nn.Module:
    """Return a perceptron for rainbow digits that is small enough to replay all past rounds in every round."""
    return Halved(mlp(3 * 14 * 14, 10, HIDDEN))


def make_digits(work: Path, seed: int, rounds: int) -> Path:
    """Return the history of a seed; create it if it is missing."""
    return make_history(_locate_history(work, seed), "rainbow_digits", seed, rounds)


def _locate_history(work: Path, seed: int) -> Path:
    return work / "digits" / str(seed) / "history"


def play_digits(policy: str, seed: int, rounds: int, work: Path, overrides: tuple[str, ...] = ()) -> Row:
    """Start or continue a run of one of ``LABELS`` on a seed's history; a finished row is loaded instead."""
    if before := load_digits_row(policy, seed, rounds, work, overrides):
        return before
    asked, place = _describe_run(policy, seed, rounds, overrides), _locate_run(work, policy, seed, rounds)
    config = read_config(Path(str(package_files("deploy") / "demo.toml")), (*asked["settings"], f"run.seed={seed}"))
    began = time.process_time()
    report = replay(config, _locate_history(work, seed), place, rounds, lambda what, done, of: None)
    row = {
        "asked": asked,
        "commit": read_commit(),
        **report["learners"][MAIN_LEARNER],
        "cpu_seconds": time.process_time() - began,
    }
    return save_row(place.with_suffix(".json"), row)


def load_digits_row(policy: str, seed: int, rounds: int, work: Path, overrides: tuple[str, ...] = ()) -> Row | None:
    """Return the row of a finished run, or None."""
    return load_row(
        _locate_run(work, policy, seed, rounds).with_suffix(".json"), _describe_run(policy, seed, rounds, overrides)
    )


def _describe_run(policy: str, seed: int, rounds: int, overrides: tuple[str, ...]) -> Row:
    name, costlier = COSTLIER.get(policy, (policy, ()))
    settings = [*POLICIES[name], *COMMON, *costlier, *overrides]
    return {"policy": policy, "seed": seed, "rounds": rounds, "settings": settings}


def _locate_run(work: Path, policy: str, seed: int, rounds: int) -> Path:
    return work / "digits" / str(seed) / f"{policy.replace(',', '').replace(' ', '_')}-{rounds}"


def compare(rows: list[Row]) -> list[dict[str, Any]]:
    """Return the mean cumulative loss of each policy, and its relative excess over ``all``, with standard errors.

    The excess is computed seed by seed, because all policies of a seed play the same rounds.
    """
    losses: dict[str, dict[int, float]] = {}
    for row in rows:
        losses.setdefault(row["asked"]["policy"], {})[row["asked"]["seed"]] = row["cumulative_loss"]
    everything = losses.get("all", {})
    table = []
    for policy, found in losses.items():
        above = [loss / everything[seed] - 1 for seed, loss in found.items() if seed in everything]
        table.append({"policy": policy, "loss": mean_and_error([*found.values()]), "above_all": mean_and_error(above)})
    return table
