"""online-meta check: check a configuration without starting a run."""

from pathlib import Path

import click

from deploy.checks.preflight import check_all
from deploy.commands._programs import share_programs
from deploy.config.config import config_file_context, read_config
from streams.private_files import private_umask


@click.command("check")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override one value of the file.")
@click.option(
    "--compile",
    "compiles",
    is_flag=True,
    help="Then compile the programs for the first tasks into the cache, [engine] programs, so that the run does not.",
)
def command(config: Path, overrides: tuple[str, ...], compiles: bool) -> None:
    """Check CONFIG without starting a run: its keys, the model under meta-gradients, the history, sources, the port."""
    settings = share_programs(read_config(config, overrides))
    click.echo(f"config   {config} is valid")
    with config_file_context(config), private_umask():
        check_all(settings, lambda what, detail: click.echo(f"{what:<8} {detail}"), compiles)
