"""online-meta export: write the meta-parameters of a checkpoint to one file."""

from pathlib import Path

import click
from safetensors.torch import save

from deploy.exits import CONFIG, CommandError
from deploy.leader import open_checkpoint
from streams.atomic_files import replace_file
from trainers.checkpoint import Checkpoint


@click.command("export")
@click.argument("checkpoint_dir", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path))
def command(checkpoint_dir: Path, file: Path) -> None:
    """Write the meta-parameters of CHECKPOINT_DIR (RUN/checkpoints/ROUND) to FILE, in safetensors format."""
    checkpoint = open_checkpoint(checkpoint_dir)
    try:
        replace_file(file, export_bytes(checkpoint), durable=False)
    except OSError as error:
        raise CommandError(CONFIG, f"{file} cannot be written: {error.strerror}") from error
    click.echo(f"{file}: the meta-parameters after {checkpoint.rounds} rounds")


def export_bytes(checkpoint: Checkpoint) -> bytes:
    """Return the meta-parameters of a checkpoint as the bytes of a safetensors file.

    Weights have their dotted names; the inner rule's parameters have the prefix ``rule.``.
    """
    saved = checkpoint.learners[checkpoint.leader]
    tensors = {name.removeprefix("weights."): value for name, value in saved.items() if name.startswith("weights.")}
    tensors |= {name: value for name, value in saved.items() if name.startswith("rule.")}
    return save(tensors, metadata={"round": str(checkpoint.rounds)})
