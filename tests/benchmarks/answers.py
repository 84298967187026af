"""``python -m tests.benchmarks.answers``: measure answers over HTTP during training, into docs/results."""

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import click
import httpx
import psutil
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Picture
from safetensors.torch import load

from streams.atomic_files import replace_file
from streams.formats.json_body import tensors_to_json
from streams.sources.sinusoid import make_task
from tests.benchmarks.streams.figure import Figure, make_figure
from tests.benchmarks.surroundings import describe_machine, log_progress, read_commit
from tests.support.daemon import Daemon, encode, free_port, running_daemon, sinusoid, sinusoid_config, wait_for

NAME = "bench_answers"
CONNECTIONS, BODIES, POINTS = 8, 64, 10
ANSWERING, PATIENCE = "a process of its own answers", 60.0
"""What the daemon's log says from then on, and how many seconds an answer may take on a busy machine."""
SETTLE_SECONDS, QUIET_SECONDS, WARM_ROUNDS = 300.0, 3.0, 60
INGEST_PER_SECOND = 20.0
SECTIONS = """
[inner]
rule = "sgd"
steps = 5
lr = 0.01
[meta]
gradient = "exact"
optimizer = "adam"
lr = 0.005
steps_per_round = 5
batch = 10
[regret]
comparator = []
{baselines}
[[source]]
kind = "{source}"
"""
ONE, POOL = "one learner", "the pool"
BASELINES = {ONE: "baselines = []", POOL: ""}
"""FTML alone, and what plays by default."""
GOALS = {ONE: (600, 25), POOL: (100, None)}
"""The least number of answers per second, and the most milliseconds of the 99th percentile."""
PACE_GOAL = 0.6
PANELS = {"answers per second": "Answers per second", "milliseconds to an answer": "Milliseconds to an answer"}
COLOURS = {ONE: "#08519c", POOL: "#6baed6"}
MEDIA_TYPES = {"safetensors": "application/octet-stream", "json": "application/json"}


def write_bodies(folder: Path) -> None:
    """Write requests of the sinusoid stream into ``folder``: safetensors/0, json/0 and so on."""
    for number in range(BODIES):
        task = make_task(1, number, POINTS, POINTS)
        body = encode({"support_x": task.support.x, "support_y": task.support.y, "query_x": task.query.x})
        written = {"safetensors": body, "json": json.dumps(tensors_to_json(body)).encode()}
        for name, content in written.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / str(number)).write_bytes(content)


def run_load(daemon: Daemon, bodies: Path, kind: str, seconds: float) -> dict[str, float]:
    """Let wrk send requests over ``CONNECTIONS`` connections; return the answers per second, p50, p99 and max.

    Raises:
        RuntimeError: if a request failed.
    """
    script = Path(__file__).with_suffix(".lua")
    command = [
        "wrk",
        "-t1",
        f"-c{CONNECTIONS}",
        f"-d{max(1, round(seconds))}s",
        "--timeout",
        f"{PATIENCE:g}s",
        "-s",
        str(script),
        f"{daemon.url}/v1/adapt",
    ]
    command += ["--", str(bodies / kind), str(BODIES), MEDIA_TYPES[kind]]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    if found["failed"]:
        raise RuntimeError(f"{found['failed']} requests failed: {output}")
    return {"rate": found["requests"] / found["seconds"], **{name: found[name] for name in ("p50", "p99", "max")}}


def warm_up(daemon: Daemon, bodies: Path) -> None:
    """Send requests until a process of its own answers, and then some of each kind."""

    def look() -> bool:
        run_load(daemon, bodies, "safetensors", 1)
        return ANSWERING in daemon.log.read_text()

    wait_for(ANSWERING, look, SETTLE_SECONDS)
    for kind in MEDIA_TYPES:
        run_load(daemon, bodies, kind, 2)


def check_answer(daemon: Daemon) -> None:
    """Fail unless the daemon answers to both kinds of body, and says the same."""
    task = make_task(1, 0, POINTS, POINTS)
    body = encode({"support_x": task.support.x, "support_y": task.support.y, "query_x": task.query.x})
    assert load(daemon.client.post("/v1/adapt", content=body).raise_for_status().content)["predictions"].shape == (
        POINTS,
        1,
    )
    plain = daemon.client.post("/v1/adapt", json=tensors_to_json(body), headers={"Content-Type": "application/json"})
    assert len(plain.raise_for_status().json()["predictions"]) == POINTS


def wait_until_settled(daemon: Daemon) -> float:
    """Wait until rounds are learned and no program is compiled any more; return the seconds that it took."""
    began = time.monotonic()
    wait_for("rounds are learned", lambda: daemon.status()["rounds"]["learned"] >= WARM_ROUNDS, SETTLE_SECONDS)
    quiet_since = time.monotonic()
    while time.monotonic() - quiet_since < QUIET_SECONDS and time.monotonic() - began < SETTLE_SECONDS:
        if _is_compiling(daemon):
            quiet_since = time.monotonic()
        time.sleep(0.25)
    return time.monotonic() - began


def _is_compiling(daemon: Daemon) -> bool:
    for child in psutil.Process(daemon.process.pid).children(recursive=True):
        try:
            if any("_compile_worker" in part or "cc1plus" in part for part in child.cmdline()):
                return True
        except psutil.Error:  # It has just ended.
            continue
    return False


def measure_pace(daemon: Daemon, during: Any) -> tuple[float, Any]:
    """Return the rounds per second that are learned while ``during()`` runs, and what it returns."""
    began, first = time.monotonic(), daemon.status()["rounds"]["learned"]
    found = during()
    learned = daemon.status()["rounds"]["learned"] - first
    return learned / (time.monotonic() - began), found


@contextmanager
def serve(folder: Path, kind: str, source: str = "sinusoid") -> Iterator[Daemon]:
    """Start a daemon that plays the sinusoid stream, with one learner or the pool."""
    folder.mkdir(parents=True)
    config = folder / "config.toml"
    sections = SECTIONS.format(baselines=BASELINES[kind], source=source)
    config.write_text(sinusoid_config(folder / "run", free_port(), hidden="40, 40", sections=sections))
    with running_daemon(config) as daemon:
        yield daemon


def measure(kind: str, folder: Path, bodies: Path, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Return what was measured: training without and with load take turns."""
    found: dict[str, list[float]] = {}
    with serve(folder, kind) as daemon:
        settled = wait_until_settled(daemon)
        check_answer(daemon)
        warm_up(daemon, bodies)
        for round in range(rounds):
            log_progress(f"{kind}, {round + 1} of {rounds}")
            alone, _ = measure_pace(daemon, lambda: time.sleep(seconds))
            loaded, answers = measure_pace(daemon, lambda: run_load(daemon, bodies, "safetensors", seconds))
            values = {**answers, "pace_alone": alone, "pace_loaded": loaded, "settled": settled}
            values |= {f"json_{key}": value for key, value in run_load(daemon, bodies, "json", seconds / 2).items()}
            for name, value in values.items():
                found.setdefault(name, []).append(value)
        with daemon.paused("trainer"):
            idle = run_load(daemon, bodies, "safetensors", seconds)
            found |= {f"idle_{name}": [value] for name, value in idle.items()}
    return found


def measure_ingest(folder: Path, bodies: Path, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Return seconds until tasks are durable, some of which arrive each second, without and with a load of requests."""
    taken: dict[str, list[float]] = {"alone": [], "loaded": []}
    with serve(folder, ONE, "http") as daemon, httpx.Client(base_url=daemon.url, trust_env=False) as client:
        _submit(client, 0, WARM_ROUNDS)
        wait_until_settled(daemon)
        warm_up(daemon, bodies)
        sent = WARM_ROUNDS
        for _ in range(rounds):
            for name, load_ in (("alone", False), ("loaded", True)):
                thread = threading.Thread(target=run_load, args=(daemon, bodies, "safetensors", seconds))
                if load_:
                    thread.start()
                count = int(INGEST_PER_SECOND * seconds)
                taken[name] += _submit(client, sent, count)
                sent += count
                if load_:
                    thread.join()
    return taken


def _submit(client: httpx.Client, first: int, count: int) -> list[float]:
    taken = []
    for number in range(first, first + count):
        body, began = sinusoid(number), time.perf_counter()
        response = client.post("/v1/tasks", content=body, headers={"Content-Type": "application/octet-stream"})
        assert response.status_code == 201, response.text
        taken.append(time.perf_counter() - began)
        time.sleep(max(0.0, 1 / INGEST_PER_SECOND - taken[-1]))
    return taken


def make_figures(kind: str, found: dict[str, list[float]]) -> list[Figure]:
    """Return the figures of one learner or of the pool."""
    least, most = GOALS[kind]
    shares = [loaded / alone for loaded, alone in zip(found["pace_loaded"], found["pace_alone"], strict=True)]

    def milliseconds(name: str) -> list[float]:
        return [1e3 * value for value in found[name]]

    return [
        make_figure("answers per second", found["rate"], least, least=True),
        make_figure("milliseconds to an answer, p99", milliseconds("p99"), most),
        make_figure("milliseconds to an answer, p50", milliseconds("p50")),
        make_figure("pace of training with the load / without", shares, PACE_GOAL, least=True),
        make_figure("rounds per second without the load", found["pace_alone"]),
        make_figure("answers per second, in JSON", found["json_rate"]),
        make_figure("milliseconds to an answer in JSON, p99", milliseconds("json_p99")),
        make_figure("answers per second while the trainer is stopped", found["idle_rate"]),
        make_figure("milliseconds to an answer while the trainer is stopped, p99", milliseconds("idle_p99")),
    ]


def make_ingest_figures(taken: dict[str, list[float]]) -> list[Figure]:
    """Return the 50th and 99th percentile of the time until a task is durable."""
    found = []
    for name, what in (("alone", "without"), ("loaded", "with")):
        ordered = sorted(taken[name])
        for share in (0.5, 0.99):
            value = 1e3 * ordered[int(share * (len(ordered) - 1))]
            found.append(
                make_figure(f"milliseconds until a task is durable, {what} the load, p{100 * share:.0f}", [value])
            )
    return found


def render(result: dict[str, Any]) -> str:
    """Return the tables as Markdown."""
    machine = result["machine"]
    text = f"""# Answers over HTTP

`{result["command"]}`, commit {result["commit"]}; {machine["processor"]}, load {machine["load_before"]:.1f} before.

A daemon plays the sinusoid stream: a perceptron 1-40-40-1, 5 inner steps, 5 meta-steps a round on 10 tasks.
Meanwhile wrk posts {POINTS} support and {POINTS} query samples to `/v1/adapt` over {CONNECTIONS} connections, and sends
the next request of a connection as soon as the answer is there. Medians over rounds of {result["seconds"]:g} seconds
with the load and without, which take turns.

![Answers per second and the time to an answer, with their goals]({NAME}.png)
"""
    tables = {f"{kind[0].upper()}{kind[1:]}": make_figures(kind, found) for kind, found in result["answers"].items()}
    tables["Tasks sent meanwhile"] = make_ingest_figures(result["ingest"])
    for title, figures in tables.items():
        text += f"\n## {title}\n\n| figure | median | min to max | goal | verdict |\n|---|---|---|---|---|\n"
        for one in figures:
            goal = "" if one.goal is None else f"{'at least' if one.least else 'at most'} {one.goal:,g}"
            spread = f"{one.lowest:,.4g} to {one.highest:,.4g}"
            text += f"| {one.what} | {one.found:,.4g} | {spread} | {goal} | {one.verdict} |\n"
    return text


def draw(result: dict[str, Any]) -> bytes:
    """Return a PNG: answers per second, and the time to an answer; black marks are goals, grey lines the spread."""
    picture = Picture(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(picture)
    for axis, (word, title) in zip(picture.subplots(1, 2), PANELS.items(), strict=True):
        found = [(kind, one) for kind, each in result["answers"].items() for one in make_figures(kind, each)]
        shown = [(kind, one) for kind, one in found if one.what.startswith(word)]
        for place, (kind, one) in enumerate(shown):
            axis.barh(-place, one.found, color=COLOURS[kind])
            axis.plot([one.lowest, one.highest], [-place, -place], color="grey")
            axis.annotate(f" {one.found:,.3g}", (one.highest, -place), va="center", fontsize=8)
            if one.goal is not None:
                axis.plot([one.goal] * 2, [-place - 0.4, -place + 0.4], color="black", linewidth=2)
        labels = [f"{kind}: {one.what.removeprefix(word).strip(', ') or 'safetensors'}" for kind, one in shown]
        axis.set_yticks([-place for place in range(len(shown))], labels, fontsize=8)
        axis.set_title(f"{title} (mark: goal)")
        axis.margins(x=0.12)
    target = BytesIO()
    picture.savefig(target, format="png", dpi=110)
    return target.getvalue()


@click.command()
@click.option("--rounds", default=5, show_default=True, help="How many times each is measured.")
@click.option("--seconds", default=10.0, show_default=True, help="Duration of a measurement.")
@click.option("--only", multiple=True, type=click.Choice([ONE, POOL]), help="May be repeated. Both by default.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs/results"), show_default=True)
def main(rounds: int, seconds: float, only: tuple[str, ...], out: Path) -> None:
    """Print and write the speed of answers, and what they cost training and ingest."""
    result: dict[str, Any] = {"command": " ".join(["python -m tests.benchmarks.answers", *sys.argv[1:]])}
    result |= {"commit": read_commit(), "machine": describe_machine(), "seconds": seconds, "answers": {}}
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        bodies = folder / "bodies"
        write_bodies(bodies)
        for number, kind in enumerate(only or (ONE, POOL)):
            result["answers"][kind] = measure(kind, folder / str(number), bodies, rounds, seconds)
        log_progress("ingest")
        result["ingest"] = measure_ingest(folder / "ingest", bodies, rounds, seconds)
    out.mkdir(parents=True, exist_ok=True)
    replace_file(out / f"{NAME}.png", draw(result), durable=False)
    replace_file(out / f"{NAME}.json", json.dumps(result, indent=1).encode(), durable=False)
    replace_file(out / f"{NAME}.md", render(result).encode(), durable=False)
    click.echo(render(result))


if __name__ == "__main__":
    main()
