"""The command line, `online-meta`: each file in ``deploy/commands`` is one command."""

import logging
import sys
from typing import Any

import click
from rich.console import Console

import deploy.commands
import online_meta
from deploy.exits import EXPECTED, USAGE, find_exit_code
from deploy.logs import is_json_logging
from online_meta import registry

log = logging.getLogger(__name__)


class Commands(click.Group):
    """A group whose commands are the files of ``deploy/commands``; a file is imported when its command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the files, with ``-`` in place of ``_``."""
        return [name.replace("_", "-") for name in registry.names(deploy.commands)]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Return the object ``command`` of the file ``name``; None if there is no such file."""
        if name not in self.list_commands(ctx):
            return None
        command: click.Command = registry.load_module(deploy.commands, name.replace("-", "_")).command
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Resolve a command; for an unknown name, fail with the most similar known name."""
        if args and args[0] not in (known := self.list_commands(ctx)) and not args[0].startswith("-"):
            ctx.fail(f"no command {args[0]!r}: {registry.nearest(args[0], known)}")
        return super().resolve_command(ctx, args)


@click.command(cls=Commands, name="online-meta", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(online_meta.__version__, prog_name="online-meta")
def group() -> None:
    """Online meta-learning: stream few-shot tasks, monitor the regret, adapt to new tasks.

    Exit codes: 0 success or drained, 64 wrong usage, 70 internal error or damaged data, 75 temporary failure (try again
    later), 78 invalid configuration or format.
    """


def main() -> None:
    """Run a command and exit; an expected error is printed as one message, without a traceback."""
    try:
        code = group.main(standalone_mode=False)
    except click.UsageError as error:
        error.show()
        code = USAGE
    except click.ClickException as error:
        error.show()
        code = USAGE
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except EXPECTED as error:
        code = find_exit_code(error)
        message = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        if is_json_logging():
            log.critical("%s", message)
        else:
            Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {_escape(message)}")
    sys.exit(code if isinstance(code, int) else 0)


def _escape(text: str) -> str:
    return text.replace("[", r"\[")
