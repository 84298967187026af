"""online-meta serve: run the daemon."""

import logging
from pathlib import Path

import click

from deploy.commands._programs import share_programs
from deploy.config.config import config_file_context, read_config
from deploy.daemon import serve
from deploy.logs import Origin, log_to_stderr
from streams.private_files import private_umask

log = logging.getLogger(__name__)


@click.command("serve")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override one value of the file.")
def command(config: Path, overrides: tuple[str, ...]) -> None:
    """Run the daemon with CONFIG until SIGTERM. A restarted run continues from its last checkpoint."""
    settings = share_programs(read_config(config, overrides))
    log_to_stderr(Origin("daemon"), settings.run.logs)
    with config_file_context(config), private_umask():
        serve(settings, lambda url: log.info("listening on %s: dashboard at /, API at /docs, metrics at /metrics", url))
    log.info("drained; report: %s/report.html", settings.run.path)
