"""`check` says whether the tasks of a model can be padded, and why not."""

from pathlib import Path

import pytest

from deploy.checks.preflight import _try_learning, check_learning
from deploy.config.config import Config, read_config
from deploy.exits import ConfigError

SEQUENCE = "[task.x.values]\nshape = [-1]\n[task.x.mask]\nshape = [-1]\n"


def write(folder: Path, model: str, more: str = "", task: str = "x_shape = [1]\n") -> Config:
    file = folder / "config.toml"
    file.write_text(
        f'[run]\npath = "{folder}/run"\n[task]\ny = "real"\ny_shape = [1]\n{task}[regret]\nbaselines = []\n'
        f'[model]\nloss = "mse"\nbuild = "tests.deploy.user_models:{model}"\n{more}'
    )
    return read_config(file)


def test_padding_is_refused_where_samples_influence_each_other(tmp_path: Path) -> None:
    message = (
        r"\[engine\] pad_sizes = \[8, 16\] fills sets up with samples that do not count, which .*batch_statistics "
        r"cannot take: changing one sample changes what the model returns for the others, so the samples of a set "
        r"influence each other, as in batch normalisation in training mode\. Either use GroupNorm or LayerNorm in "
        r"place of the layer '1' \(BatchNorm1d\), or leave pad_sizes out"
    )
    with pytest.raises(ConfigError, match=message):
        check_learning(write(tmp_path, "batch_statistics", "[engine]\npad_sizes = [8, 16]\n"))


def test_without_sizes_a_note_says_that_nothing_is_padded(tmp_path: Path) -> None:
    _, notes = _try_learning(write(tmp_path, "batch_statistics"), remarks=False)
    (note,) = notes
    assert note.startswith("sets of other sizes are not filled up: changing one sample changes what the model returns")
    assert note.endswith("to change that, use GroupNorm or LayerNorm in place of the layer '1' (BatchNorm1d)")


def test_other_models_may_be_padded(tmp_path: Path) -> None:
    config = write(tmp_path, "MaskedMean", 'masks = { values = "mask" }\n[engine]\npad_sizes = [8, 16]\n', SEQUENCE)
    _, notes = _try_learning(config, remarks=False)
    assert notes == ()


def test_a_mask_that_the_model_does_not_use_is_refused(tmp_path: Path) -> None:
    config = write(tmp_path, "MaskedMean", 'masks = { values = "mask" }\nargs = { masks = false }\n', SEQUENCE)
    with pytest.raises(
        ConfigError, match=r"longer by entries of mask 0 must give the same answer, .* it changes the meta"
    ):
        check_learning(config)


def test_a_mask_that_is_no_input_is_refused(tmp_path: Path) -> None:
    config = write(tmp_path, "MaskedMean", 'masks = { values = "masks" }\n', SEQUENCE)
    with pytest.raises(
        ConfigError, match=r"masks names 'masks', which is no input of \[task\.x\]: did you mean 'mask'\?"
    ):
        check_learning(config)
