"""``python -m tests.benchmarks.streams``: measure the speed of the streams and the history, into docs/results."""

import importlib
import json
import pkgutil
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from streams.atomic_files import replace_file
from tests.benchmarks.streams import figures
from tests.benchmarks.surroundings import describe_machine, read_commit

NAME = "bench_streams"
KNOWN = sorted(module.name for module in pkgutil.iter_modules(figures.__path__))


def render(result: dict[str, Any]) -> str:
    """Return the tables as Markdown."""
    processor = result["machine"]["processor"]
    text = f"""# Streams and the history

`{result["command"]}`; {processor}. Medians over rounds; the variants
that are compared take turns within each round.
"""
    for name, measured in result["figures"].items():
        module = importlib.import_module(f"{figures.__name__}.{name}")
        about = f"commit {measured['commit']}, load {measured['load_before']:.1f} before, {measured['seconds']:.0f} s"
        text += f"\n{module.TITLE} ({about}).\n\n"
        text += "| figure | median | min to max | goal | verdict |\n|---|---|---|---|---|\n"
        for one in module.make_figures(measured["samples"]):
            goal = "" if one.goal is None else f"{'at least' if one.least else 'at most'} {one.goal:,g}"
            spread = f"{one.lowest:,.4g} to {one.highest:,.4g}"
            text += f"| {one.what} | {one.found:,.4g} | {spread} | {goal} | {one.verdict} |\n"
    return text


@click.command()
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(KNOWN),
    help="A group of figures; may be repeated. The other groups on the page stay. All by default.",
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs/results"), show_default=True)
def main(only: tuple[str, ...], out: Path) -> None:
    """Print and write the figures."""
    result: dict[str, Any] = {"command": "python -m tests.benchmarks.streams", "machine": describe_machine()}
    known = out / f"{NAME}.json"
    result["figures"] = json.loads(known.read_bytes())["figures"] if only and known.exists() else {}
    for name in only or KNOWN:
        click.echo(f"{time.strftime('%H:%M:%S')} {name}", err=True)
        load, began = describe_machine()["load_before"], time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            samples = importlib.import_module(f"{figures.__name__}.{name}").measure(Path(folder))
        seconds = time.perf_counter() - began
        found = {"commit": read_commit(), "load_before": load, "seconds": seconds, "samples": samples}
        result["figures"] = dict(sorted({**result["figures"], name: found}.items()))
    replace_file(out / f"{NAME}.json", json.dumps(result, indent=1).encode(), durable=False)
    replace_file(out / f"{NAME}.md", render(result).encode(), durable=False)
    click.echo(render(result))


if __name__ == "__main__":
    main()
