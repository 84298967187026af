"""What a bounded replay policy loses against all rounds: cumulative loss on one stream, seed by seed."""

import time
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from deploy.commands.replay import replay
from deploy.config.config import read_config
from online_meta.regret.ledger import MAIN_LEARNER
from tests.experiments.common.histories import make_history
from tests.experiments.common.tables import Row, commit, keep, read_kept, spread
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
"""Every policy, with its own defaults, and what switches it on in a configuration."""

DEARER: dict[str, tuple[str, tuple[str, ...]]] = {
    "stratified, 100 tasks a step": ("stratified", ("meta.batch=100",)),
    "stratified, 4 steps a round": ("stratified", ("meta.steps_per_round=4",)),
}
"""Bounded policies with four times the meta-gradients a round: which, and what says so."""

PLAYED = (*POLICIES, *DEARER)
PLAIN = (
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
    """A network that sees images of half the side."""

    def __init__(self, network: nn.Module) -> None:
        """Put the images through ``network`` once they are small, and in -0.5..0.5."""
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Map images (n, 3, 28, 28) of 0..255 to logits (n, 10)."""
        shades = images.to(next(self.network.parameters()).dtype) / 255
        logits: Tensor = self.network(avg_pool2d(shades - 0.5, 2))
        return logits


def digits_mlp() -> nn.Module:
    """Return a perceptron for rainbow digits, small enough for every past round to be revisited in every round."""
    return Halved(mlp(3 * 14 * 14, 10, HIDDEN))


def make_digits(work: Path, seed: int, rounds: int) -> Path:
    """Return the history of a seed, made if need be."""
    return make_history(_history_of(work, seed), "rainbow_digits", seed, rounds)


def _history_of(work: Path, seed: int) -> Path:
    return work / "digits" / str(seed) / "history"


def play_digits(policy: str, seed: int, rounds: int, work: Path, overrides: tuple[str, ...] = ()) -> Row:
    """Play the rounds of a seed's history by one of ``PLAYED``, or go on with it; a row that was finished is read."""
    if before := finished_digits(policy, seed, rounds, work, overrides):
        return before
    asked, place = _asked(policy, seed, rounds, overrides), _place_of(work, policy, seed, rounds)
    config = read_config(Path(str(package_files("deploy") / "demo.toml")), (*asked["settings"], f"run.seed={seed}"))
    began = time.process_time()
    report = replay(config, _history_of(work, seed), place, rounds, lambda what, done, of: None)
    row = {
        "asked": asked,
        "commit": commit(),
        **report["learners"][MAIN_LEARNER],
        "cpu_seconds": time.process_time() - began,
    }
    return keep(place.with_suffix(".json"), row)


def finished_digits(policy: str, seed: int, rounds: int, work: Path, overrides: tuple[str, ...] = ()) -> Row | None:
    """Return the row of what was played to the end before."""
    return read_kept(
        _place_of(work, policy, seed, rounds).with_suffix(".json"), _asked(policy, seed, rounds, overrides)
    )


def _asked(policy: str, seed: int, rounds: int, overrides: tuple[str, ...]) -> Row:
    name, dearer = DEARER.get(policy, (policy, ()))
    settings = [*POLICIES[name], *PLAIN, *dearer, *overrides]
    return {"policy": policy, "seed": seed, "rounds": rounds, "settings": settings}


def _place_of(work: Path, policy: str, seed: int, rounds: int) -> Path:
    return work / "digits" / str(seed) / f"{policy.replace(',', '').replace(' ', '_')}-{rounds}"


def compare(rows: list[Row]) -> list[dict[str, Any]]:
    """Return for each policy its mean cumulative loss, with its standard error, and how far above that of ``all``.

    What is above is a share, taken seed by seed: all policies of a seed play the same rounds.
    """
    losses: dict[str, dict[int, float]] = {}
    for row in rows:
        losses.setdefault(row["asked"]["policy"], {})[row["asked"]["seed"]] = row["cumulative_loss"]
    everything = losses.get("all", {})
    table = []
    for policy, found in losses.items():
        above = [loss / everything[seed] - 1 for seed, loss in found.items() if seed in everything]
        table.append({"policy": policy, "loss": spread([*found.values()]), "above_all": spread(above)})
    return table
