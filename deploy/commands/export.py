"""online-meta export: write the meta-parameters of a checkpoint to one file."""

from pathlib import Path

import click
from pydantic import TypeAdapter

from deploy.exits import CONFIG, TRY_LATER, CommandError
from deploy.leader import Leader, open_checkpoint, restore_answering_learner
from streams.atomic_files import replace_file
from trainers.build import build_module
from trainers.checkpoint import list_checkpoints
from trainers.journal.fork_log import read_branches
from trainers.journal.leader_file import encode_leader
from trainers.journal.run_files import RunFiles
from trainers.models.adapters import save_adapter
from trainers.settings import TrainerSettings
from trainers.shared_weights import build_in


@click.command("export")
@click.argument("checkpoint_dir", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--adapter",
    is_flag=True,
    help="Write the low-rank additions (LoRA) of the model instead, to a folder FILE that the library peft loads.",
)
def command(checkpoint_dir: Path, file: Path, adapter: bool) -> None:
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
        if adapter:
            _save_adapter(checkpoint_dir, leader, file)
        else:
            replace_file(file, encode_leader(leader.state, leader.round, learner=leader.learner), durable=False)
    except OSError as error:
        raise CommandError(CONFIG, f"{file} cannot be written: {error.strerror}") from error
    click.echo(f"{file}: the {'adapter' if adapter else 'state'} of {leader.learner} after {leader.round} rounds")


def _save_adapter(checkpoint_dir: Path, leader: Leader, folder: Path) -> None:
    settings = TypeAdapter(TrainerSettings).validate_python(open_checkpoint(checkpoint_dir).settings)
    with build_in(settings.engine.frozen_folder):
        module = build_module(settings.model, settings.seed)
    base = str(settings.model.args.get("path_or_import", ""))
    try:
        save_adapter(module, leader.meta.weights, folder, base)
    except (KeyError, ValueError) as error:
        reason = f"{leader.learner} has no weight {error}" if isinstance(error, KeyError) else str(error)
        raise CommandError(CONFIG, f"{checkpoint_dir} gives no adapter: {reason}") from error
