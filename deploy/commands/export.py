"""online-meta export: write the meta-parameters of a checkpoint to one file."""

from pathlib import Path

import click

from deploy.exits import CONFIG, CommandError
from deploy.leader import restore_answering_learner
from streams.atomic_files import replace_file
from trainers.journal.leader_file import encode_leader


@click.command("export")
@click.argument("checkpoint_dir", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path))
def command(checkpoint_dir: Path, file: Path) -> None:
    """Write what the run answers from at CHECKPOINT_DIR (RUN/checkpoints/ROUND) to FILE, in safetensors format.

    Where the pool answers, these are the meta-parameters of the learner that leads, FTML by default.
    """
    leader = restore_answering_learner(checkpoint_dir)[1].without_pool()
    try:
        replace_file(file, encode_leader(leader.state, leader.round, learner=leader.learner), durable=False)
    except OSError as error:
        raise CommandError(CONFIG, f"{file} cannot be written: {error.strerror}") from error
    click.echo(f"{file}: the state of {leader.learner} after {leader.round} rounds")
