"""online-meta adapt: adapt to a new task and print predictions."""

from pathlib import Path
from typing import get_args

import click
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from deploy.commands._client import daemon_client, expect_success
from deploy.exits import CONFIG, CommandError
from deploy.leader import adapt_from_checkpoint
from deploy.predictions import MOST_SAMPLES, AnswerFormat, Part, decode_predictions, encode_predictions
from online_meta.types import Params, Prediction
from streams.formats import wire
from streams.types import Rejected


@click.command("adapt")
@click.option(
    "--support", required=True, type=click.Path(path_type=Path), help="safetensors file with support_x and support_y."
)
@click.option("--query", required=True, type=click.Path(path_type=Path), help="safetensors file with query_x.")
@click.option("--url", help="Use the current meta-parameters of the daemon at this address.")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="Use the meta-parameters of this folder: RUN/checkpoints/ROUND.",
)
@click.option("--token-file", type=click.Path(path_type=Path), help="File that contains the daemon's token.")
@click.option(
    "--part",
    "parts",
    multiple=True,
    type=click.Choice(get_args(Part)),
    help="Add the expected target, its standard deviation, the probabilities of classes, or how much the label of each "
    "query row would tell; may be repeated.",
)
@click.option(
    "--level",
    "levels",
    multiple=True,
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Add the value below which the target lies with this probability; may be repeated.",
)
@click.option(
    "--samples",
    type=click.IntRange(1, MOST_SAMPLES),
    help="Answer with this number of samples of what is believed of the task, in place of [inner] samples.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Write the predictions to this safetensors file; do not print them."
)
def command(
    support: Path,
    query: Path,
    url: str | None,
    checkpoint: Path | None,
    token_file: Path | None,
    parts: tuple[Part, ...],
    levels: tuple[float, ...],
    samples: int | None,
    out: Path | None,
) -> None:
    """Adapt to a support set and print predictions for a query set, one line for each row.

    Use either --url, which asks a running daemon, or --checkpoint, which needs no daemon. Parts follow the prediction
    in its line, in the order in which they are given, and then the quantiles.
    """
    if (url is None) == (checkpoint is None):
        raise click.UsageError("give either --url or --checkpoint")
    tensors = {**_pick(support, ("support_x", "support_y"), ("support_weight",)), **_pick(query, ("query_x",))}
    if url is not None:
        with daemon_client(url, token_file) as client:
            headers = {"Content-Type": "application/vnd.safetensors"}
            count = [] if samples is None else [samples]
            params: dict[str, list[str | float]] = {"part": [*parts], "level": [*levels], "samples": [*count]}
            response = client.post("/v1/adapt", params=params, content=save(tensors), headers=headers)
            encoded = expect_success(response).content
    else:
        assert checkpoint is not None
        examples = wire.gather_batch(tensors, "support")
        answer = adapt_from_checkpoint(checkpoint, examples, wire.gather_tensors(tensors, "query_x"), samples)
        encoded = _encode(*answer, AnswerFormat(False, parts, levels))
    if out is not None:
        out.write_bytes(encoded)
        return
    decoded = decode_predictions(encoded)
    if "outside" in decoded:
        _warn_of_outside(decoded["outside"])
    columns = [decoded.get("labels", decoded["predictions"]), *(decoded[part] for part in parts)]
    columns += [*decoded["quantiles"]] if levels else []
    for row in torch.cat([column.reshape(len(column), -1).double() for column in columns], 1).tolist():
        click.echo(" ".join(f"{value:g}" for value in row))


def _warn_of_outside(outside: torch.Tensor) -> None:
    """Name the rows that lie outside of what the run has seen, on the standard error."""
    rows = ", ".join(str(row) for row in outside.nonzero().flatten().tolist())
    click.echo(f"beyond all inputs that the run has seen, so do not rely on them: rows {rows}", err=True)


def _encode(prediction: Prediction, outside: torch.Tensor, format: AnswerFormat) -> bytes:
    try:
        return encode_predictions(prediction, format, outside)
    except Rejected as error:
        raise CommandError(CONFIG, error.detail) from error


def _pick(file: Path, names: tuple[str, ...], optional: tuple[str, ...] = ()) -> Params:
    """Return the tensors of these names, or of these names with a dot and a name of their own."""
    try:
        tensors = load(file.read_bytes())
    except OSError as error:
        raise CommandError(CONFIG, f"{file} cannot be read: {error.strerror}") from error
    except SafetensorError as error:
        raise CommandError(CONFIG, f"{file} is not a safetensors file: {error}") from error
    found = {name: [key for key in tensors if key == name or key.startswith(f"{name}.")] for name in names + optional}
    missing = [name for name in names if not found[name]]
    if missing:
        raise CommandError(
            CONFIG, f"{file} has no {' and no '.join(missing)}; it has {', '.join(sorted(tensors)) or 'nothing'}"
        )
    return {key: tensors[key] for keys in found.values() for key in keys}
