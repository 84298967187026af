"""Errors of the history: what is missing, busy, full, damaged or no longer kept."""


class HistoryError(Exception):
    """Something is wrong with the history; the message says what, where, and what would help."""


class HistoryMissing(HistoryError):
    """There is no history in the folder."""


class HistoryBusy(HistoryError):
    """Another process, or another History of this one, is the history's writer."""


class HistoryFormatError(HistoryError):
    """The file is not a history, or one of another format; it is left as it was."""


class HistoryFull(HistoryError):
    """The disk takes no more; nothing of the append was kept. Appends work again once there is space."""


class ArchiveUnreachable(HistoryError):
    """The object store of the archive cannot be reached, or refuses; asking again later may help."""


class HistoryDamaged(HistoryError):
    """What was kept does not read back as it was written."""


class RoundDiscarded(HistoryError):
    """Retention has taken the round away; its id is known for ever, so that it does not come twice."""


class ArchiveMoved(HistoryError):
    """The archive is said to lie elsewhere than the segments that the ledger knows."""
