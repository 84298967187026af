"""online-meta export: write the meta-parameters of a checkpoint to one file."""

from pathlib import Path

import click

from deploy.exits import CONFIG, TRY_LATER, CommandError
from deploy.leader import restore_answering_learner
from streams.atomic_files import replace_file
from trainers.checkpoint import list_checkpoints
from trainers.journal.fork_log import read_branches
from trainers.journal.leader_file import encode_leader
from trainers.journal.run_files import RunFiles


@click.command("export")
@click.argument("checkpoint_dir", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path))
def command(checkpoint_dir: Path, file: Path) -> None:
    """Write what the run answers from at CHECKPOINT_DIR (RUN/checkpoints/ROUND) to FILE, in safetensors format.

    Where the pool answers, these are the meta-parameters of the learner that leads, FTML by default. With RUN itself,
    it is the newest checkpoint of the branch that is served; of a fork, that is one of RUN/forks/NAME/checkpoints.
    """
    if RunFiles(checkpoint_dir).settings.exists():
        branches = read_branches(checkpoint_dir)
        saved = branches.files_of(checkpoint_dir, branches.served).checkpoints
        newest = max(list_checkpoints(saved), default=None)
        if newest is None:
            raise CommandError(TRY_LATER, f"{checkpoint_dir} has no checkpoint yet")
        checkpoint_dir = saved / str(newest)
    leader = restore_answering_learner(checkpoint_dir)[1].without_pool()
    try:
        replace_file(file, encode_leader(leader.state, leader.round, learner=leader.learner), durable=False)
    except OSError as error:
        raise CommandError(CONFIG, f"{file} cannot be written: {error.strerror}") from error
    click.echo(f"{file}: the state of {leader.learner} after {leader.round} rounds")
