"""Define the errors of the history."""


class HistoryError(Exception):
    """The history cannot be used; the message says what is wrong, where, and how to fix it."""


class HistoryMissing(HistoryError):
    """The folder has no history."""


class HistoryBusy(HistoryError):
    """Another process, or another ``History`` object of this process, is writing to the history."""


class HistoryFormatError(HistoryError):
    """The file is not a history or has an unsupported format; it is left unchanged."""


class HistoryFull(HistoryError):
    """The disk is full; the whole append was rolled back. Appends work again once there is space."""


class ArchiveUnreachable(HistoryError):
    """The object store of the archive cannot be reached or refuses access; a later attempt may succeed."""


class HistoryDamaged(HistoryError):
    """Stored data is missing or differs from what was written."""


class RoundDiscarded(HistoryError):
    """Retention has discarded the round's task; its id stays known, so that the task is not accepted again."""


class RoundForgotten(RoundDiscarded):
    """The round's task was erased with its entity."""


class ArchiveMoved(HistoryError):
    """The configured location of the archive differs from that of the recorded segments."""
