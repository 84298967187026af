"""The report of a run: report.json for programs, report.html and regret.png for people."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from pydantic import TypeAdapter

from deploy.config import Config
from deploy.series import regret_series
from deploy.view import RunView
from online_meta.regret import EXACT_COMPARATORS
from streams.durable import replace_file

LIBRARIES = ("online-meta", "torch", "numpy", "safetensors")
POINTS = 600


def write_report(folder: Path, view: RunView, config: Config) -> dict[str, Any]:
    """Write report.json, report.html and regret.png into ``folder``; return what report.json holds."""
    from deploy.plot import plot_regret  # It takes a third of a second, and a daemon that starts does without.

    report = make_report(view, config)
    replace_file(folder / "report.json", json.dumps(report, indent=1, allow_nan=False).encode(), durable=False)
    picture = plot_regret(regret_series(view, 0, None, POINTS))
    replace_file(folder / "regret.png", picture, durable=False)
    pages = Environment(loader=PackageLoader("deploy", "templates"), autoescape=select_autoescape())
    page = pages.get_template("report.html").render(
        report=report, folder=folder, verdicts=verdicts(report), exact=EXACT_COMPARATORS
    )
    replace_file(folder / "report.html", page.encode(), durable=False)
    return report


def make_report(view: RunView, config: Config) -> dict[str, Any]:
    """Return the report as plain data."""
    return {
        "rounds": view.learned(),
        "skipped": view.skipped,
        "learners": view.learners(),
        "regret": view.regret(),
        "config": TypeAdapter(Config).dump_python(config, mode="json"),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}},
    }


def verdicts(report: dict[str, Any]) -> list[str]:
    """Say in a sentence each how FTML stands against every baseline and comparator."""
    sentences = []
    for against, regret in report["regret"].items():
        per_round = regret["value"] / max(regret["as_of_round"], 1)
        if regret["kind"] == "baseline":
            side = "less" if regret["value"] < 0 else "more"
            sentences.append(
                f"FTML lost {abs(per_round):.3f} {side} per round than {display_name(against)}, "
                f"over {regret['as_of_round']} rounds."
            )
        else:
            error = f" (standard error {regret['standard_error']:.1f})" if regret["standard_error"] else ""
            sentences.append(
                f"Against the {display_name(against)} comparator, as of round {regret['as_of_round']}, the regret is "
                f"{regret['value']:.1f}{error}, {per_round:.3f} per round. {_describe_comparator(against)}"
            )
    return sentences


def _describe_comparator(comparator: str) -> str:
    if comparator in EXACT_COMPARATORS:
        return "The comparator is exact: the best fixed meta-parameters, by algebra."
    best = "each task's own best meta-parameters" if comparator == "dynamic" else "the best fixed meta-parameters"
    return f"The comparator is an estimate: it loses at least as much as {best}, so the regret shown is a lower bound."


def display_name(name: str) -> str:
    """Return a learner's or comparator's name as people write it."""
    return name.replace("_", " ")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
