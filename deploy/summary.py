"""The summary of a report, for the terminal."""

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from deploy.report import display_name, verdicts
from online_meta.regret import EXACT_COMPARATORS, MAIN_LEARNER


def summary_table(report: dict[str, Any]) -> Group:
    """Lay a report out: a line for each learner, then a sentence for each comparison."""
    table = Table(title=f"{report['rounds']} rounds of the same stream", title_justify="left")
    table.add_column("learner")
    for column in ("mean loss, last 100", "mean accuracy, last 100", "cumulative loss", "regret of FTML"):
        table.add_column(column, justify="right")
    for name, learner in report["learners"].items():
        regret = report["regret"].get(name)
        table.add_row(
            "[bold]FTML[/]" if name == MAIN_LEARNER else display_name(name),
            _format_figure(learner["mean_loss_last_100"], "{:.4f}"),
            _format_figure(learner["mean_accuracy_last_100"], "{:.1%}"),
            f"{learner['cumulative_loss']:.2f}",
            f"{regret['value']:+.2f}" if regret else "",
        )
    for name, regret in report["regret"].items():
        if regret["kind"] != "baseline":
            ftml_loss = report["learners"][MAIN_LEARNER]["cumulative_loss"]
            known = "exact" if name in EXACT_COMPARATORS else "estimate"
            label = f"{display_name(name)} ({known}, as of round {regret['as_of_round']})"
            table.add_row(
                label,
                "",
                "",
                f"{ftml_loss - regret['value']:.2f}" if _covers_all_rounds(report, regret) else "",
                f"{regret['value']:+.2f}",
            )
    return Group(table, *(Text(sentence) for sentence in verdicts(report)))


def _covers_all_rounds(report: dict[str, Any], regret: dict[str, Any]) -> bool:
    return bool(regret["as_of_round"] == report["rounds"])


def _format_figure(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
