"""``python -m tests.benchmarks.large_models --out DIR``: find the largest transformer that one GPU meta-learns by MAML.

Each method of saving memory computes the exact meta-gradient of one task, with K inner steps on all weights, for
transformers of growing width until the memory is full. ``--tiny`` tests this on a CPU with an artificial limit.
PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True reduces fragmentation of the GPU's memory.
"""

import gc
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch

import online_meta as om
from online_meta.memory import MemoryMeter, bytes_of
from online_meta.preflight.preflight import unrolled
from online_meta.types import Meta, MetaGrad, Task
from tests.benchmarks.surroundings import log_progress, read_commit
from trainers.memory_estimate import gradient_peak
from trainers.models import transformer

NAME = "large_models"
WAYS, FEATURES = 5, 64


class Scale(NamedTuple):
    """The sizes that are tried: widths and blocks of the transformers, and the task."""

    widths: Sequence[int]
    layers: int
    heads: int
    length: int
    queries: int
    steps: int


GPU = Scale((256, 384, 512, 640, 768, 896, *range(1024, 4097, 128)), 24, 16, 128, 15, 8)
TINY = Scale((16, 24, 32, 48, 64), 3, 2, 12, 3, 4)
LIMIT_OF_TINY = 8_000_000

METHODS: dict[str, tuple[dict[str, bool], tuple[str, ...]] | None] = {
    "unrolled": None,
    "adjoint": ({}, ()),
    "rematerialised": ({"rematerialise": True}, ()),
    "rematerialised, blocks recomputed": ({"rematerialise": True}, ("body.*",)),
    "the same, offloaded": ({"rematerialise": True, "offload": True}, ("body.*",)),
}
"""For each method, the options of ``exact`` and the globs to recompute; None is the loop unrolled in one graph."""


class Setting(NamedTuple):
    """A model to try: a function from the number of steps to its inner loop, meta-parameters, and a task."""

    inner: Callable[[int], om.Inner]
    meta: Meta
    task: Task


class Trial(NamedTuple):
    """The result for one width; ``peak`` and ``seconds`` are None if it did not fit."""

    width: int
    parameters: int
    peak: int | None
    seconds: float | None


def make_setting(scale: Scale, width: int, globs: tuple[str, ...], device: torch.device) -> Setting:
    """Return a transformer of the given width, a 5-way 1-shot task of sequences, and an inner loop of SGD."""
    torch.manual_seed(0)
    with device:
        module = transformer(WAYS, scale.length, features=FEATURES, width=width, heads=scale.heads, layers=scale.layers)
        batches = [
            om.Batch(torch.randn(WAYS * each, scale.length, FEATURES), torch.arange(WAYS).repeat(each))
            for each in (1, scale.queries)
        ]
    loss = om.model_loss(module, "cross_entropy", recompute=globs)
    rule = om.rules.sgd(lr=0.01)
    weights = {name: weight.detach() for name, weight in module.named_parameters()}
    return Setting(lambda steps: om.Inner(loss, rule, steps), Meta(weights, {}), Task(*batches))


def build_gradient(way: str, setting: Setting, steps: int) -> Callable[[Meta, Task], MetaGrad]:
    """Return the function that computes the meta-gradient with a method."""
    chosen = METHODS[way]
    return partial(unrolled, setting.inner(steps)) if chosen is None else om.exact(setting.inner(steps), **chosen[0])


def get_globs(way: str) -> tuple[str, ...]:
    """Return the globs of the layers that a method recomputes."""
    chosen = METHODS[way]
    return () if chosen is None else chosen[1]


def try_width(scale: Scale, way: str, width: int, device: torch.device, *, timed: bool = False) -> Trial:
    """Compute the meta-gradient of one task, twice if ``timed``; all memory is freed before and after."""
    parameters = 0
    _free_memory(device)
    try:
        setting = make_setting(scale, width, get_globs(way), device)
        parameters = sum(weight.numel() for weight in setting.meta.weights.values())
        gradient = build_gradient(way, setting, scale.steps)
        peak = _measure_peak(lambda: gradient(setting.meta, setting.task), setting, device)
        began = time.perf_counter()
        if timed:
            gradient(setting.meta, setting.task)
            _wait(device)
        return Trial(width, parameters, peak, time.perf_counter() - began if timed else None)
    except torch.OutOfMemoryError:
        return Trial(width, parameters, None, None)
    finally:
        setting = gradient = None  # type: ignore[assignment]
        _free_memory(device)


def _free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _measure_peak(work: Callable[[], Any], setting: Setting, device: torch.device) -> int:
    """Return the bytes allocated at the peak of ``work``, including meta-parameters and task."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        work()
        _wait(device)
        return torch.cuda.max_memory_allocated()
    with MemoryMeter() as meter:
        work()
    peak = meter.peak + bytes_of(setting.meta.weights)
    if peak > LIMIT_OF_TINY:
        raise torch.OutOfMemoryError(f"{peak} bytes exceed the artificial limit of {LIMIT_OF_TINY}")
    return peak


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def find_largest(
    scale: Scale, way: str, device: torch.device, deadline: float, first: int
) -> tuple[Trial | None, bool]:
    """Find the largest width that fits by bisection from a first guess; also return whether the time sufficed."""
    fits, fails, found = -1, len(scale.widths), None
    place = first
    while fails - fits > 1:
        if time.monotonic() > deadline:
            return found, False
        place = min(max(place, fits + 1), fails - 1)
        trial = try_width(scale, way, scale.widths[place], device)
        log_progress(
            f"  width {trial.width}: {trial.parameters / 1e6:.3g} M parameters, {_format_gigabytes(trial.peak)}"
        )
        if trial.peak is None:
            fails = place
        else:
            fits, found = place, trial
        # The guess is usually close: search in steps around it, and bisect once both bounds are known.
        known = fits >= 0 and fails < len(scale.widths)
        place = (fits + fails) // 2 if known else place + 3 if trial.peak is not None else place - 3
    return found, True


def estimate_peak(scale: Scale, way: str, width: int, device: torch.device) -> int | None:
    """Return the estimated peak, including meta-parameters; None for the unrolled loop, which has no estimate."""
    chosen = METHODS[way]
    if chosen is None:
        return None
    setting = make_setting(scale, width, chosen[1], device)
    try:
        peak = gradient_peak(
            lambda steps: om.exact(setting.inner(steps)), setting.meta, setting.task, scale.steps, **chosen[0]
        )
    except torch.OutOfMemoryError:  # Where tensors without memory fail, the estimate runs the real model.
        return None
    return peak.total + bytes_of(setting.meta.weights)


def measure(scale: Scale, device: torch.device, seconds: float) -> dict[str, Any]:
    """Return for each method the largest width, its peak, its time, and the error of the estimate."""
    began, rows = time.monotonic(), {}
    place = len(scale.widths) // 3
    for number, way in enumerate(METHODS):
        log_progress(way)
        deadline = began + seconds * (number + 1) / len(METHODS)
        found, done = find_largest(scale, way, device, deadline, place)
        if found is None:
            rows[way] = {"fits": None, "done": done}
            continue
        place = scale.widths.index(found.width) + 1
        timed = try_width(scale, way, found.width, device, timed=True)
        estimate = estimate_peak(scale, way, found.width, device) if timed.peak else None
        rows[way] = {
            **found._asdict(),
            "done": done,
            "seconds": timed.seconds,
            "tasks_per_second": 1 / timed.seconds if timed.seconds else None,
            "estimate": estimate,
            "estimate_error": estimate / timed.peak - 1 if estimate and timed.peak else None,
        }
        log_progress(f"  {json.dumps(rows[way])}")
    return rows


def compare(scale: Scale, width: int, device: torch.device) -> dict[str, Any]:
    """Return peak and time of every method for one model that fits with all of them."""
    return {way: try_width(scale, way, width, device, timed=True)._asdict() for way in METHODS}


def render(result: dict[str, Any]) -> str:
    """Return the tables as Markdown."""
    scale = result["scale"]
    text = f"""# The largest model on one GPU

`python -m tests.benchmarks.large_models`, commit {result["commit"]}; {result["device"]}, torch {result["torch"]}, fp32.

The exact MAML gradient of one task, K = {scale["steps"]} SGD steps on all weights of a transformer with
{scale["layers"]} blocks, for sequences of {scale["length"]} positions, {WAYS}-way 1-shot, {scale["queries"]} query
sequences per class. The width grows until the memory is full. The peak is that of torch's allocator. It includes the
meta-parameters, but no optimizer.

| method | width | parameters | peak | seconds per task | tasks/s | estimate off by |
|---|---|---|---|---|---|---|
"""
    for way, row in result["largest"].items():
        if row.get("peak") is None:
            text += f"| {way} | none fits | | | | | |\n"
            continue
        off = "" if row["estimate_error"] is None else f"{row['estimate_error']:+.1%}"
        seconds, speed = (f"{row[key]:.3g}" if row[key] else "" for key in ("seconds", "tasks_per_second"))
        mark = "" if row["done"] else " (at least; the time limit was reached)"
        text += f"| {way} | {row['width']}{mark} | {row['parameters'] / 1e6:.3g} M | {_format_gigabytes(row['peak'])} "
        text += f"| {seconds} | {speed} | {off} |\n"
    text += "\nThe same model, the widest that fits with the unrolled loop, by every method:\n\n"
    text += "| method | peak | peak / unrolled | seconds per task |\n|---|---|---|---|\n"
    base = result["same_model"]["unrolled"]["peak"]
    for way, row in result["same_model"].items():
        share = f"{row['peak'] / base:.2f}" if row["peak"] and base else ""
        seconds = f"{row['seconds']:.3g}" if row["seconds"] else ""
        text += f"| {way} | {_format_gigabytes(row['peak'])} | {share} | {seconds} |\n"
    return text


def _format_gigabytes(count: int | None) -> str:
    return "does not fit" if count is None else f"{count / 1e9:.3g} GB"


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The folder to write to.")
@click.option("--seconds", default=330.0, show_default=True, help="Time limit of the search for sizes.")
@click.option("--tiny", is_flag=True, help="Run on a CPU with an artificial limit.")
def main(out: Path, seconds: float, tiny: bool) -> None:
    """Print and write the largest model of each method."""
    scale, device = (TINY, torch.device("cpu")) if tiny else (GPU, torch.device("cuda"))
    result: dict[str, Any] = {
        "commit": read_commit(),
        "device": "CPU, tiny" if tiny else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "scale": scale._asdict(),
        "largest": measure(scale, device, seconds),
    }
    width = result["largest"]["unrolled"].get("width") or scale.widths[0]
    result["same_model"] = compare(scale, width, device)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{NAME}.json").write_text(json.dumps({**result, "scale": {**result["scale"]}}, indent=1, default=list))
    (out / f"{NAME}.md").write_text(render(result))
    click.echo(render(result))


if __name__ == "__main__":
    main()
