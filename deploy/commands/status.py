"""online-meta status: print the state of a daemon."""

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from deploy.commands._client import daemon_client, expect_success
from deploy.reports.report import choose_shown, describe_regret, format_losses, format_mean
from online_meta.regret.verdict import display_name


@click.command("status")
@click.option("--url", required=True, help="Address of the daemon, for example http://127.0.0.1:8780")
@click.option("--token-file", type=click.Path(path_type=Path), help="File that contains the daemon's token.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(url: str, token_file: Path | None, as_json: bool) -> None:
    """Show rounds, backlog, regret and the last checkpoint of the daemon at URL."""
    with daemon_client(url, token_file) as client:
        status = expect_success(client.get("/v1/status")).json()
    if as_json:
        click.echo(json.dumps(status))
    else:
        Console(highlight=False).print(status_table(status))


def status_table(status: dict[str, Any]) -> Table:
    """Return the answer of ``/v1/status`` as a table with one line per item."""
    rounds, last, checkpoint = status["rounds"], status["last"], status["checkpoint"]
    table = Table(
        title=f"{status['run']}: {status['state'].replace('_', ' ')}", show_header=False, title_justify="left"
    )
    for row in health_rows(status["health"]):
        table.add_row(*row)
    pending = f"{rounds['pending']} pending, {rounds['skipped']} skipped"
    if rounds["quarantined"]:
        pending += f", {rounds['quarantined']} quarantined"
    table.add_row("rounds", f"{rounds['learned']} learned of {rounds['ingested']} ingested, {pending}")
    for row in verdict_rows(status.get("verdict", {})):
        table.add_row(*row)
    table.add_row("pace", f"{rounds['learned_per_second']:.2f} rounds/s")
    if last and not last["skipped"]:
        # Rounds are counted from 1, as on the page.
        table.add_row("last round", f"{last['round'] + 1}: {format_losses(last)}")
    shown = choose_shown(status["learners"], status.get("verdict", {}))
    for row in (*loss_rows(shown), *leak_rows(status["leaks"], shown), *regret_rows(status, shown)):
        table.add_row(*row)
    age = (
        f"round {checkpoint['round']}, {status['now'] - checkpoint['timestamp']:.0f} s ago"
        if checkpoint
        else "none yet"
    )
    table.add_row("last checkpoint", age)
    for row in (*gap_rows(status["gaps"]), *omission_rows(status.get("omissions", {}))):
        table.add_row(*row)
    for row in (*trainer_rows(status["trainer"]), *fork_rows(status.get("forks") or {}, rounds["ingested"])):
        table.add_row(*row)
    return table


def verdict_rows(verdict: dict[str, Any]) -> list[tuple[str, str]]:
    """Return table rows that say whether meta-learning pays; none for a daemon of 0.1.0, which does not say."""
    found = (("verdict", verdict.get("sentence")), ("advice", verdict.get("advice")))
    return [(name, sentence) for name, sentence in found if sentence]


def regret_rows(status: dict[str, Any], shown: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield table rows with the regret against each answer that is ``shown`` and each comparator."""
    for against, regret in status["regret"].items():
        if against in shown or regret["kind"] != "baseline":
            yield f"regret against {display_name(against)}", describe_regret(regret)
    if len(shown) < len(status["learners"]):
        yield "further answers", f"{len(status['learners']) - len(shown)} that matter less: see --json"


def fork_rows(forks: dict[str, Any], total: int) -> Iterator[tuple[str, str]]:
    """Yield a table row for each branch of the run, if it has forks."""
    branches = forks.get("forks", [])
    for one in branches if len(branches) > 1 else []:
        changes = f" with {', '.join(one['changes'])} from round {one['at']} on" if one["changes"] else ""
        state = "served" if one["served"] else "in the background" if one["alive"] else "DOWN"
        text = f"{state}: {one['learned']} of {total} rounds{changes}"
        paired = one["against_served"]
        if paired and paired["rounds"]:
            losses = f"loss {paired['mean_loss']:.4f}, and {paired['mean_loss_served']:.4f} of {forks['served']}"
            text += f"\n{losses} in the same {paired['rounds']} rounds: {paired['mean_difference']:+.4f}"
            if paired["interval"]:
                text += f" ({paired['interval'][0]:+.4f} to {paired['interval'][1]:+.4f})"
        yield ("branch main" if one["parent"] is None else f"fork {one['name']}"), text


def loss_rows(learners: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield table rows with each learner's mean loss, the rounds that it is over, and those without a finite loss."""
    for name, learner in learners.items():
        if learner["mean_loss_last_100"] is not None:
            charged = learner["charged_rounds_last_100"]
            note = f", {charged} of them not finite" if charged else ""
            mean = format_mean(learner["mean_loss_last_100"], learner["rounds_last_100"], "loss {:.4f}")
            yield f"{display_name(name)}, last 100", mean + note


def leak_rows(leaks: dict[str, int], learners: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield table rows on the rounds whose query set may have been seen before, and the mean losses without them."""
    if not leaks["rounds"]:
        return
    kinds = f"{leaks['duplicates']} repeated tasks, {leaks['overlaps']} with shared samples"
    yield "query sets seen before", f"{leaks['rounds']} rounds: {kinds}"
    for name, learner in learners.items():
        mean, rounds = (learner["without_leaks"][key] for key in ("mean_loss_last_100", "rounds_last_100"))
        yield f"{display_name(name)}, last 100 without them", format_mean(mean, rounds, "loss {:.4f}")


def health_rows(health: dict[str, Any]) -> list[tuple[str, str]]:
    """Return table rows with the level of the run's health, and each check that is not ok, what fails first."""
    found = sorted((check for check in health["checks"] if check["level"] != "ok"), key=lambda one: one["level"])
    if not found:
        return [("health", "ok")]
    rows = [("health", f"{len(found)} of {len(health['checks'])} checks need attention")]
    return rows + [
        (f"{'FAILS' if check['level'] == 'fail' else 'warning'}: {check['name']}", _advise(check)) for check in found
    ]


def _advise(check: dict[str, Any]) -> str:
    since = datetime.fromtimestamp(check["since"]).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    return f"{check['evidence']}, since {since}\n{check['what_to_do']}"


def gap_rows(gaps: dict[str, Any]) -> list[tuple[str, str]]:
    """Return a table row for each source whose broker has deleted entries before they were read."""
    rows = []
    for name, found in gaps.items():
        last = found["last"]
        where = f"the last in {last['where']}, {last['first']} to {last['last']}"
        rows.append((f"source {name}", f"LOST {found['lost_entries']} entries in {found['gaps']} gaps, {where}"))
    return rows


def omission_rows(omissions: dict[str, list[str]]) -> list[tuple[str, str]]:
    """Return a table row for each source that ignores something."""
    return [(f"source {name} ignores", "\n".join(found)) for name, found in omissions.items()]


def trainer_rows(trainer: dict[str, Any]) -> list[tuple[str, str]]:
    """Return table rows that say what the trainer does and, for several ranks, how each rank spends its time."""
    alive, ranks = "alive" if trainer["alive"] else "DOWN", trainer["world_size"]
    counts = f"{ranks} {'rank' if ranks == 1 else 'ranks'}, {trainer['restarts']} restarts"
    rows = [("trainer", f"{alive}, {counts}; {trainer['doing']}")]
    if len(trainer["ranks"]) > 1:
        for rank in trainer["ranks"]:
            times = f"{rank['step_seconds']:.1f} s, and {rank['waiting_seconds']:.1f} s waiting for other ranks"
            rows.append((f"rank {rank['rank']} on {rank['host']}", f"{rank['steps']} meta-steps in {times}"))
    return rows
