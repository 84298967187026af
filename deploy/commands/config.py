"""``online-meta config``: print a JSON Schema of the configuration, or a complete example."""

import json

import click

from deploy.config.config import Config
from deploy.config.describe import make_example, make_schema


@click.command()
@click.option("--schema", is_flag=True, help="Print the JSON Schema, with which an editor completes and checks TOML.")
@click.option("--example", is_flag=True, help="Print a complete configuration: every key, its default, its meaning.")
def command(schema: bool, example: bool) -> None:
    """Describe the configuration file.

    Write the schema to a file, and name it in the first line of a configuration: `#:schema online-meta.schema.json`.
    """
    if schema == example:
        raise click.UsageError("give one of --schema and --example")
    click.echo(json.dumps(make_schema(Config), indent=2) if schema else make_example(Config), nl=schema)
