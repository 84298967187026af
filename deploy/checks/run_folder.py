"""Open the files of an existing run and check that they match the configuration."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import ValidationError

from deploy.config.config import Config, HistorySettings, read_settings
from deploy.exits import CONFIG, TRY_LATER, CommandError, ConfigError
from online_meta.batches import as_named
from online_meta.types import Batch
from streams.history.archive.archive import Archive
from streams.history.archive_index import ARCHIVE_FOLDER, Location, open_store_at, record_location
from streams.history.errors import ArchiveMoved, HistoryBusy, HistoryFormatError, HistoryFull
from streams.history.history import History
from streams.spec import TaskSpec, fits
from trainers.checkpoint import CheckpointError, load_latest, read_latest_settings
from trainers.journal.run_files import RunFiles
from trainers.journal.tuning_log import settings_of_checkpoint
from trainers.settings_fingerprint import (
    Sections,
    SettingsChanged,
    adopt_defaults,
    check_same_settings,
    reproducibility_key,
)

log = logging.getLogger(__name__)


@contextmanager
def open_history(files: RunFiles, settings: HistorySettings) -> Iterator[History]:
    """Open the run's history for writing; close it at the end of the block.

    Args:
        files: of the run.
        settings: [history] section of the configuration.

    Raises:
        CommandError: with exit code 75 if another process writes to the history or the disk is full, 78 if its format
            is unknown or the archive has moved.
        ConfigError: if the folder cannot be written or the archive cannot be opened.
    """
    try:
        history = _open_archive(History.open(files.history, write=True), settings)
    except HistoryBusy as error:
        raise CommandError(TRY_LATER, f"{error}: another daemon serves this run already") from error
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
    """Record the configured location of the archive; raises ``ArchiveMoved`` if it has rounds at another location."""
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
            log.warning(
                "the archive %s is unreachable; rounds will be sealed when it is reachable again: %s",
                settings.archive,
                error,
            )
    except BaseException:
        history.close()
        raise
    return history


def check_archive(settings: HistorySettings, folder: Path) -> str:
    """Return one line on the state of the archive.

    Args:
        settings: [history] section of the configuration.
        folder: of the history; the archive is in it unless the settings name another location.

    Raises:
        ConfigError: if the archive cannot be opened.
        CommandError: with exit code 75 if the archive cannot be reached.
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
    return f"{error.filename} cannot be written ({error.strerror}); choose a folder in which this user may write"


def make_run_folder(files: RunFiles) -> None:
    """Create the run's folder if it does not exist; raises ``ConfigError`` if that fails."""
    try:
        files.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"[run] path = {str(files.folder)!r}: {_explain_write_error(error)}") from error


NEW_RUN = "restore the old value, or choose another run.path for a new run"


def check_tasks(history: History, spec: TaskSpec, where: Path, advice: str = NEW_RUN) -> None:
    """Check that the tasks in a history have the shapes and types of the configuration.

    Args:
        history: may be empty.
        spec: [task] section of the configuration.
        where: path of the history, for the error message.
        advice: what the message says that would be right.

    Raises:
        ConfigError: if they differ.
    """
    newest = history.newest_task()  # Retention never removes the newest round.
    if newest is None:
        return
    for (place, name), expected, value in _compare_tensors(newest.support, spec):
        open_size = isinstance(expected, tuple) and isinstance(value, tuple) and fits(value, expected)
        if expected != value and not open_size:
            raise ConfigError(f"[{place}] {name} = {expected!r}, but the tasks in {where} have {value!r}: {advice}")


def _compare_tensors(support: Batch, spec: TaskSpec) -> Iterator[tuple[tuple[str, str], object, object]]:
    """Yield the section and key, the value that ``spec`` has, and that of the samples."""
    x, y = as_named(support.x), as_named(support.y)
    if list(x) != list(spec.inputs()):
        yield ("task", "x"), list(spec.x), list(x) if "" not in x else []
        return
    if list(y) != list(spec.list_targets()):
        yield ("task", "targets"), list(spec.targets), list(y) if "" not in y else []
        return
    for name, given in spec.inputs().items():
        place, shape, dtype = (f"task.x.{name}", "shape", "dtype") if name else ("task", "x_shape", "x_dtype")
        yield (place, shape), given.shape, tuple(x[name].shape[1:])
        yield (place, dtype), given.dtype, str(x[name].dtype).removeprefix("torch.")
    for name, target in spec.list_targets().items():
        place, kind, shape = (f"task.targets.{name}", "kind", "shape") if name else ("task", "y", "y_shape")
        yield (place, kind), target.kind, "real" if y[name].dtype.is_floating_point else "class"
        yield (place, shape), target.shape, tuple(y[name].shape[1:])


def adopt_run_defaults(config: Sections, files: RunFiles) -> Sections:
    """Return the configuration with the values with which the run began, for the keys that it leaves open.

    A run so keeps its learners when a later version plays others by default.
    """
    recorded = read_latest_settings(files.checkpoints)
    if recorded is None and files.rounds.exists() and files.rounds.stat().st_size and files.settings.exists():
        with suppress(ValidationError):  # Settings of another version cannot be compared; the first checkpoint will be.
            recorded = reproducibility_key(read_settings(files.settings))
    return config if recorded is None else adopt_defaults(config, recorded)


def check_same_run(config: Config, files: RunFiles) -> None:
    """Check that the run can continue with this configuration.

    Raises:
        ConfigError: if rounds were learned with settings that lead to other parameters, or if all checkpoints are
            damaged.
    """
    try:
        checkpoint = load_latest(files.checkpoints)
        if checkpoint is not None:
            check_same_settings(checkpoint.settings, settings_of_checkpoint(config.trainer(), files, checkpoint.rounds))
        elif files.rounds.exists() and files.rounds.stat().st_size and files.settings.exists():
            check_same_settings(reproducibility_key(read_settings(files.settings)), config.trainer())
    except (SettingsChanged, CheckpointError) as error:
        raise ConfigError(f"{files.folder}: {error}") from error
    except ValidationError:
        return  # Settings of another version cannot be compared; the first checkpoint will be.
