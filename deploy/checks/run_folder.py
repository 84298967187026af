"""Open what a run has kept, and see that the configuration is the one that it was kept under."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from deploy.config.config import Config, HistorySettings, read_settings
from deploy.exits import CONFIG, TRY_LATER, CommandError, ConfigError
from streams.history.archive.archive import Archive
from streams.history.archive_index import ARCHIVE_FOLDER, Location, open_store_at, record_location
from streams.history.errors import ArchiveMoved, HistoryBusy, HistoryFormatError, HistoryFull
from streams.history.history import History
from streams.spec import TaskSpec, fits
from trainers.checkpoint import CheckpointError, load_latest
from trainers.journal.run_files import RunFiles
from trainers.settings_fingerprint import SettingsChanged, check_same_settings, reproducibility_key

log = logging.getLogger(__name__)


@contextmanager
def open_history(files: RunFiles, settings: HistorySettings) -> Iterator[History]:
    """Open the run's history to write; raises ``CommandError`` with the exit code that fits."""
    try:
        history = _open_archive(History.open(files.history, write=True), settings)
    except HistoryBusy as error:
        raise CommandError(TRY_LATER, f"{error}: this run is being served already") from error
    except (HistoryFormatError, ArchiveMoved) as error:
        raise CommandError(CONFIG, str(error)) from error
    except HistoryFull as error:
        raise CommandError(TRY_LATER, str(error)) from error
    except OSError as error:
        raise ConfigError(f"[run] path = {str(files.folder)!r}: {_explain_write_error(error)}") from error
    try:
        yield history
    finally:
        history.close()


def _open_archive(history: History, settings: HistorySettings) -> History:
    """Let the archive be where the configuration says; raises ``ArchiveMoved`` if rounds lie elsewhere."""
    try:
        with history.borrow_writer() as writer:
            record_location(writer, Location(settings.archive, settings.archive_options))
        try:
            archive = history.archive
        except (ValueError, ImportError) as error:
            raise ConfigError(f"[history] archive: {error}") from error
        try:
            archive.names()
        except archive.unreachable_errors as error:
            log.warning("the archive %s is away; rounds are sealed when it is back: %s", settings.archive, error)
    except BaseException:
        history.close()
        raise
    return history


def check_archive(settings: HistorySettings, folder: Path) -> str:
    """Return how the archive is that belongs to the history in ``folder``.

    Raises:
        ConfigError: if it cannot be opened.
        Stop: if it cannot be reached now.
    """
    try:
        archive = Archive(open_store_at(Location(settings.archive, settings.archive_options), folder))
    except (ValueError, ImportError) as error:
        raise ConfigError(f"[history] archive: {error}") from error
    try:
        return f"{settings.archive or folder / ARCHIVE_FOLDER} holds {len(archive.names())} segments"
    except archive.unreachable_errors as error:
        raise CommandError(TRY_LATER, f"[history] archive = {settings.archive!r} cannot be reached: {error}") from error


def _explain_write_error(error: OSError) -> str:
    return f"{error.filename} cannot be written ({error.strerror}); choose a folder where this user may write"


def make_run_folder(files: RunFiles) -> None:
    """Make the run's folder where there is none; raises ``ConfigError`` when that may not be."""
    try:
        files.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"[run] path = {str(files.folder)!r}: {_explain_write_error(error)}") from error


def check_tasks(history: History, spec: TaskSpec, where: Path) -> None:
    """Raise ``ConfigError`` when the tasks of the history are not those that ``spec`` describes."""
    if not len(history):
        return
    x, y = history[len(history) - 1].support  # The newest is always there.
    found = {
        "x_shape": tuple(x.shape[1:]),
        "x_dtype": str(x.dtype).removeprefix("torch."),
        "y": "real" if y.dtype.is_floating_point else "class",
        "y_shape": tuple(y.shape[1:]),
    }
    for name, value in found.items():
        if getattr(spec, name) != value and not (name == "x_shape" and fits(tuple(x.shape[1:]), spec.x_shape)):
            raise ConfigError(
                f"[task] {name} = {getattr(spec, name)!r}, but the tasks in {where} have {value!r}: "
                "set it back, or give the new run another run.path"
            )


def check_same_run(config: Config, files: RunFiles) -> None:
    """Raise ``ConfigError`` when rounds were learned under settings that give other parameters.

    A run whose checkpoints are all damaged cannot go on either.
    """
    try:
        checkpoint = load_latest(files.checkpoints)
        if checkpoint is not None:
            check_same_settings(checkpoint.settings, config.trainer())
        elif files.rounds.exists() and files.rounds.stat().st_size and files.settings.exists():
            check_same_settings(reproducibility_key(read_settings(files.settings)), config.trainer())
    except (SettingsChanged, CheckpointError) as error:
        raise ConfigError(f"{files.folder}: {error}") from error
    except ValidationError:
        return  # settings of another version: the checkpoint to come decides
